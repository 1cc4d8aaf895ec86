"""What several tests of runs begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.jobs import Place, job, rows, write_job


@pytest.fixture
def two_shards(folder: Place, tmp_path: Path) -> Path:
    """A job over 150 and 50 rows."""
    folder.write_parquet("in/a.parquet", rows(150))
    folder.write_parquet("in/b.parquet", rows(50, start=150))
    return write_job(tmp_path, job(folder))
