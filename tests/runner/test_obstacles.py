"""What stands in the way of an output's files is found before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from batchinfer.errors import ConfigError
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, write_job

FOLDERS = (
    "",
    "_batchinfer",
    "_batchinfer/runs",
    "_batchinfer/status",
    "_batchinfer/logs",
    "_batchinfer/leases",
    "_batchinfer/parts",
    "_batchinfer/unreadable",
    "_batchinfer/parts/sub",
    "_batchinfer/parts/sub/a.parquet.parts",
    "sub",
)
FILES = (
    "_SUCCESS",
    "sub/a.parquet",
    "b.parquet",
    "_batchinfer/job.json",
    "_batchinfer/restart.json",
    "_batchinfer/runs/0001.json",
    "_batchinfer/status/0001.json",
    "_batchinfer/logs/0001.log",
    "_batchinfer/leases/all.lock",
)


@pytest.fixture
def small(folder: Place, tmp_path: Path) -> Path:
    folder.write_parquet("in/sub/a.parquet", rows(5))
    folder.write_parquet("in/b.parquet", rows(5, start=5))
    settings = job(folder, input={"path": folder.url("in", "**", "*.parquet")})
    return write_job(tmp_path, settings)


def is_refused_until_it_is_gone(
    small: Path, folder: Place, path: Path, words: str, remove: Callable[[], None]
) -> None:
    log = Path(folder.url("requests"))
    refused = run_here(small, fake={"log_file": str(log)})
    assert isinstance(refused.error, ConfigError), refused.message
    assert f"{path} is {words}" in refused.message
    assert not log.exists(), "something was computed before"
    remove()
    ended = run_here(small)
    assert ended.code == 0, ended.message
    assert len(results(folder)) == 10


@pytest.mark.parametrize("key", FOLDERS)
def test_a_file_where_a_folder_is_needed_is_named_first(
    key: str, small: Path, folder: Place
) -> None:
    path = Path(folder.url("out")) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    is_refused_until_it_is_gone(small, folder, path, "a file where a folder is needed", path.unlink)


@pytest.mark.parametrize("key", FILES)
def test_a_folder_where_a_file_is_needed_is_named_first(
    key: str, small: Path, folder: Place
) -> None:
    path = Path(folder.url("out")) / key
    path.mkdir(parents=True)
    is_refused_until_it_is_gone(small, folder, path, "a folder where a file is needed", path.rmdir)


@pytest.mark.parametrize("key", ["_SUCCESS", "_batchinfer/job.json", "_batchinfer/runs/0001.json"])
def test_a_pipe_is_not_read(key: str, small: Path, folder: Place) -> None:
    path = Path(folder.url("out")) / key
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    is_refused_until_it_is_gone(small, folder, path, "a pipe, a socket or a device", path.unlink)


def test_other_files_and_links_to_folders_are_in_nobodys_way(small: Path, folder: Place) -> None:
    out, other = Path(folder.url("out")), Path(folder.url("disk"))
    for name in ("sub", "parts"):
        (other / name).mkdir(parents=True)
    (out / "_batchinfer").mkdir(parents=True)
    (out / "sub").symlink_to(other / "sub")
    (out / "_batchinfer" / "parts").symlink_to(other / "parts")
    (out / "notes").mkdir()
    (out / "a.parquet.bak").touch()
    (out / "_batchinfer" / "runs").mkdir()
    (out / "_batchinfer" / "runs" / "old").mkdir()
    assert run_here(small).code == 0
    assert (other / "sub" / "a.parquet").is_file()
