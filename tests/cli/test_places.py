"""Where relative paths start: the current directory, and every message that matters says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import MODEL, ROOT, Place, job, rows, write_job


def batchinfer(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchinfer", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def with_relative_paths(tmp_path: Path) -> Path:
    """A job file beside its input and model, which it gives by relative paths."""
    folder = tmp_path / "jobs"
    Place(str(folder)).write_parquet("in/s0.parquet", rows(3))
    (folder / "model").symlink_to(MODEL)
    places = {"input": {"path": "in/*.parquet"}, "model": {"path": "model"}}
    return write_job(folder, job(Place(str(tmp_path)), **places))


def test_a_missing_job_file_is_reported_with_the_folder_it_was_sought_in(tmp_path: Path) -> None:
    ended = batchinfer(tmp_path, "validate", "jobs/summarize.yaml")
    assert ended.returncode == 2
    assert "jobs/summarize.yaml: no such job file" in ended.stderr
    assert f"relative paths start at the current directory, {tmp_path}" in ended.stderr


def test_a_job_started_elsewhere_is_refused_with_where_its_paths_would_be(
    with_relative_paths: Path, tmp_path: Path
) -> None:
    assert batchinfer(with_relative_paths.parent, "validate", "job.yaml").returncode == 0
    for command in ("validate", "run", "plan"):
        ended = batchinfer(tmp_path, command, "jobs/job.yaml")
        assert ended.returncode == 2
        assert f"there is no folder {tmp_path / 'model'}" in ended.stderr
        assert f"relative paths start at the current directory, {tmp_path};" in ended.stderr
        assert f"the job file's folder, {tmp_path / 'jobs'}, has model: start there" in ended.stderr
    ended = batchinfer(tmp_path, "validate", "jobs/job.yaml", "--set", f"model.path={MODEL}")
    assert "nothing matches in/*.parquet" in ended.stderr and "has in/*.parquet" in ended.stderr


def test_an_error_of_another_kind_says_nothing_of_paths(
    with_relative_paths: Path, tmp_path: Path
) -> None:
    ended = batchinfer(
        with_relative_paths.parent, "validate", "job.yaml", "--set", "input.id_column=nope"
    )
    assert ended.returncode == 2 and "relative paths" not in ended.stderr


@pytest.mark.parametrize("key", ["input.path", "model.path", "output.path"])
def test_a_home_folder_that_nobody_has_is_refused(with_relative_paths: Path, key: str) -> None:
    ended = batchinfer(
        with_relative_paths.parent, "run", "job.yaml", "--set", f"{key}=~nobody-here/x"
    )
    assert ended.returncode == 2
    assert f"{key}: ~nobody-here is not a known home folder" in ended.stderr


def test_a_current_directory_that_is_gone_is_told(
    with_relative_paths: Path, tmp_path: Path
) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m batchinfer run x.yaml"
    ended = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 2
    assert "the current directory cannot be used" in ended.stderr
    assert '"exit_code": 2' in ended.stdout
