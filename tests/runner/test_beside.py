"""What an output holds beside the results of its input is said, with its number of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from batchinfer.runner import RunOptions
from tests.support.in_process import run_here
from tests.support.jobs import Ended, Place, job, results, rows, run, write_job


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    for index, name in enumerate(("a", "b")):
        folder.write_parquet(f"in/{name}.parquet", rows(20 + index, start=100 * index))
    return write_job(tmp_path, job(folder))


def leave(folder: Place, name: str) -> None:
    shutil.move(folder.url("in", name), folder.url(name))


def come_back(folder: Place, name: str) -> None:
    shutil.move(folder.url(name), folder.url("in", name))


def status(folder: Place) -> str:
    return run(folder.url("out"), command=("status",)).stdout


def must_warn(ended: Ended, *words: str) -> None:
    assert ended.code == 0, ended.stderr
    (warning,) = ended.result["warnings"]
    for word in words:
        assert word in warning, warning


def test_results_of_a_shard_that_left_the_input_are_counted_apart_at_each_start(
    folder: Place, path: Path
) -> None:
    assert run_here(path).code == 0
    leave(folder, "b.parquet")
    for _ in range(2):  # the second finds the output complete
        ended = run(path)
        must_warn(ended, "b.parquet is no longer in the input", "21 rows")
        assert ended.result["rows"] == 20
    assert results(folder).height == 41
    assert "besides: 21 rows of 1 shards" in status(folder)
    planned = run(path, command=("validate",))
    assert "21 rows" in planned.stdout
    come_back(folder, "b.parquet")
    ended = run(path)
    assert (ended.code, ended.result["rows"], ended.result["warnings"]) == (0, 41, [])
    assert "besides" not in status(folder)


def test_durable_rows_of_a_shard_that_left_unfinished_are_not_forgotten(
    folder: Place, path: Path
) -> None:
    assert run_here(path, RunOptions(limit=25)).code == 0
    assert any("/b.parquet.parts/" in name for name in folder.names("out"))
    leave(folder, "b.parquet")
    for _ in range(2):
        ended = run(path)
        must_warn(ended, "b.parquet left the input before it was finished", "5 durable rows")
        assert ended.result["status"] == "complete"
    assert "unfinished: 5 durable rows of 1 shards" in status(folder)
    come_back(folder, "b.parquet")
    ended = run(path)
    assert (ended.code, ended.result["rows"], ended.result["rows_computed"]) == (0, 41, 16)
    assert ended.result["warnings"] == []


def test_a_strange_file_in_a_complete_output_is_named(folder: Place, path: Path) -> None:
    assert run_here(path).code == 0
    folder.write_parquet("out/deep/x.parquet", rows(3))
    must_warn(run(path), "deep/x.parquet", "not of this job")
    success = json.loads(Path(folder.url("out", "_SUCCESS")).read_text())
    assert "not_in_input" not in success


@pytest.mark.parametrize("limit", [None, 25])
def test_an_input_folder_may_be_called_like_the_folder_of_anothers_parts(
    folder: Place, tmp_path: Path, limit: int | None
) -> None:
    names = ("a.parquet", "a.parquet.parts/b.parquet", "a.parquet.parts/c.parquet.parts/d.parquet")
    for index, name in enumerate(names):
        folder.write_parquet(f"in/{name}", rows(20, start=20 * index))
    settings = {"path": folder.url("in", "**", "*.parquet")}
    path = write_job(tmp_path, job(folder, input=settings, checkpoint={"every_rows": 4}))
    assert run_here(path, RunOptions(limit=limit)).code == 0
    ended = run_here(path)
    assert ended.code == 0, ended.message
    assert results(folder).height == 60
    assert not [n for n in folder.names("out") if n.endswith(".part")]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("deep/_batchinfer/b.parquet", "*/_batchinfer/*.parquet"),
        ("a.parquet.parts/w000000-r0001-000001.part/b.parquet", "**/*.parquet"),
    ],
)
def test_input_whose_results_would_be_taken_for_something_else_is_refused(
    folder: Place, tmp_path: Path, name: str, pattern: str
) -> None:
    for key in ("a.parquet", name):
        folder.write_parquet(f"in/{key}", rows(2))
    path = write_job(tmp_path, job(folder, input={"path": folder.url("in", pattern)}))
    ended = run_here(path)
    assert ended.code == 2 and "cannot have its results at" in ended.message
