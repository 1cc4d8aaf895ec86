"""`plan` counts an output's work as a run would: by what the output was begun with."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.errors import InputError
from batchinfer.runner import RunOptions
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, rows, write_job


@pytest.fixture
def begun(folder: Place, tmp_path: Path) -> Path:
    """A job over two shards of 150 and 50 rows; the first 170 rows have their results."""
    folder.write_parquet("in/a.parquet", rows(150))
    folder.write_parquet("in/b.parquet", rows(50, start=150))
    path = write_job(tmp_path, job(folder, packing={"window_rows": 16}))
    assert run_here(path, RunOptions(limit=170)).code == 0
    return path


def planned(path: Path, *arguments: str) -> str:
    ended = CliRunner().invoke(cli, ["plan", str(path), "--no-tokenizer", *arguments])
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_windows_are_those_of_the_output(begun: Path) -> None:
    assert "14 windows" in planned(begun)
    assert "14 windows" in planned(begun, "--set", "packing.window_rows=64")


def test_windows_of_a_complete_output_are_its_own(begun: Path) -> None:
    assert run_here(begun).code == 0
    text = planned(begun, "--set", "packing.window_rows=64")
    assert "14 windows" in text and "done     200 (100%)" in text


def test_results_count_as_done_when_job_json_is_lost(folder: Place, begun: Path) -> None:
    """A run finds out from the parts what it said, and goes on."""
    assert "done     170 (85%)" in planned(begun)
    Path(folder.url("out", "_batchinfer", "job.json")).unlink()
    text = planned(begun, "--set", "packing.window_rows=64")
    assert "done     170 (85%)" in text and "1 finished files" in text and "14 windows" in text
    assert run_here(begun).code == 0
    assert "done     200 (100%)" in planned(begun)


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_shards_that_changed_are_refused_as_a_run_refuses_them(
    folder: Place, begun: Path, command: str
) -> None:
    folder.write_parquet("in/a.parquet", rows(151))
    assert "changed since their rows were computed" in run_here(begun).message
    ended = CliRunner().invoke(cli, [command, str(begun)])
    assert isinstance(ended.exception, InputError)
    assert "changed since their rows were computed" in str(ended.exception)


def test_the_types_of_an_output_without_results_do_not_bind_a_run(
    folder: Place, tmp_path: Path
) -> None:
    """Nor the commands that say what it would do."""
    folder.write_parquet("in/a.parquet", rows(4))
    path = write_job(tmp_path, job(folder))
    assert run_here(path, fake={"fail_build": "no model"}).code != 0
    assert "_batchinfer/job.json" in folder.names("out")
    Path(folder.url("in", "a.parquet")).unlink()
    folder.write_parquet("in/b.parquet", pl.DataFrame({"id": [1, 2], "text": ["a", "b"]}))
    other = ("--set", "packing.window_rows=32")
    assert "2 to compute in all" in planned(path, *other)
    assert run_here(path).code == 2  # with the same size of windows the record stays
