"""What generation writes does not change by accident: finished files, byte for byte."""

from __future__ import annotations

import io
import json

import polars as pl
import pyarrow.parquet as pq
import pytest

from batchinfer.sink import file_facts
from tests.support.golden import GOLDEN, JOBS, WRITTEN_BY, finished_file, versions


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_finished_file_of_generation_is_what_it_was(name: str) -> None:
    kept = (GOLDEN / f"{name}.parquet").read_bytes()
    now = finished_file(name)
    assert pl.read_parquet(io.BytesIO(now)).equals(pl.read_parquet(io.BytesIO(kept)))
    was, facts = (file_facts(pq.read_metadata(io.BytesIO(content))) for content in (kept, now))
    assert facts == was
    if json.loads(WRITTEN_BY.read_text()) == versions():
        assert now == kept
