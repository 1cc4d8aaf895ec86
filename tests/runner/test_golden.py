"""What generation writes does not change by accident: finished files, byte for byte."""

from __future__ import annotations

import io
import json
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from batchinfer.config import SamplingSettings
from batchinfer.sink import file_facts
from tests.support.golden import GOLDEN, JOBS, WRITTEN_BY, finished_file, versions


def without_new_settings(facts: dict[str, Any], was: dict[str, Any]) -> dict[str, Any]:
    """Footers repeat all of `sampling`: keys that came later are there too, at their defaults."""
    new = facts["sampling"].keys() - was["sampling"].keys()
    defaults = SamplingSettings().model_dump(mode="json")
    assert {key: facts["sampling"][key] for key in new} == {key: defaults[key] for key in new}
    kept = {key: value for key, value in facts["sampling"].items() if key not in new}
    return {**facts, "sampling": kept}


def data_of(file: bytes) -> bytes:
    """All of a Parquet file before its footer."""
    return file[: -8 - int.from_bytes(file[-8:-4], "little")]


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_finished_file_of_generation_is_what_it_was(name: str) -> None:
    kept = (GOLDEN / f"{name}.parquet").read_bytes()
    now = finished_file(name)
    assert pl.read_parquet(io.BytesIO(now)).equals(pl.read_parquet(io.BytesIO(kept)))
    was, facts = (file_facts(pq.read_metadata(io.BytesIO(content))) for content in (kept, now))
    assert was is not None and facts is not None
    assert without_new_settings(facts, was) == was
    if json.loads(WRITTEN_BY.read_text()) == versions():
        assert data_of(now) == data_of(kept)
