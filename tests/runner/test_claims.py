"""A run reads what it is given, and a shard is finished by whoever has all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from batchinfer.runner import run as runs
from batchinfer.runner.claims import Claim
from batchinfer.runner.session import Session
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, write_job

NUM_ROWS = 200  # windows of 64


def test_windows_given_alone_become_parts_and_a_later_run_finishes_the_shard(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/a.parquet", rows(NUM_ROWS))
    path = write_job(tmp_path, job(folder))

    def second_window(session: Session) -> Iterator[Claim]:
        yield Claim(session.pending[0], range(1, 2))

    with mock.patch.object(runs, "whole_shards", second_window):
        assert run_here(path).code == 0
    names = folder.names("out")
    parts = [name for name in names if name.endswith(".part")]
    assert "a.parquet" not in names and "_SUCCESS" not in names
    assert {row for part in parts for row in folder.read_parquet(f"out/{part}")["row"]} == set(
        range(64, 128)
    )
    assert run_here(path).code == 0
    assert sorted(results(folder)["row"]) == list(range(NUM_ROWS))
    assert results(folder).filter(results(folder)["attempt"] == 1).height == 64
