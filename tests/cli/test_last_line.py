"""Every end of `run` is one JSON line on stdout, also before there is a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.telemetry import Outcome
from tests.support.jobs import Ended, Place, job, rows, run, write_job


def must_say(ended: Ended, code: int, *words: str) -> None:
    (line,) = ended.stdout.splitlines()
    assert ended.code == ended.result["exit_code"] == code, ended.stderr
    assert list(json.loads(line)) == list(Outcome("failed", code, "").as_dict())
    for word in words:
        assert word in ended.result["message"] and word in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["job.yaml", "--slice", "2/1"], ["--slice", "i/n"]),
        (["job.yaml", "--limit", "0"], ["--limit", "x>=1"]),
        (["job.yaml", "--shard", "1/2", "--restart", "--quiet"], ["--restart"]),
        (["job.yaml", "--bogus"], ["--bogus"]),
        (["job.yaml", "another.yaml"], ["another.yaml"]),
        (["--set"], ["--set"]),
        (["--log-format", "xml", "job.yaml"], ["xml"]),
        (["nowhere/job.yaml", "--quiet"], ["nowhere/job.yaml", "no such job file"]),
        (["job.yaml\x01"], ["no such job file"]),
    ],
)
def test_a_mistake_in_the_command_line_has_a_last_line(
    arguments: list[str], words: list[str]
) -> None:
    """A mistake in the command line is told to machines too."""
    must_say(run(arguments[0], *arguments[1:]), 2, *words)


def test_a_missing_argument_has_a_last_line() -> None:
    """A missing argument is told to machines too."""
    must_say(run("run", command=()), 2, "JOB")


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "a: 1\na: 2", "!!python/none x", "\x00"])
def test_an_unreadable_job_file_has_a_last_line(text: str, tmp_path: Path) -> None:
    """A job file that cannot be read is told to machines too."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    must_say(run(path), 2, "job.yaml")


def test_help_is_not_a_run() -> None:
    ended = run("--help")
    assert ended.code == 0 and ended.stdout.startswith("Usage:")


def test_other_commands_leave_their_stdout_alone() -> None:
    ended = run("nowhere.yaml", command=("validate",))
    assert (ended.code, ended.stdout) == (2, "")


@pytest.mark.parametrize("module", ["pyarrow", "yaml"])
def test_a_damaged_installation_is_reported_as_such(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('libwanted.so: no such file')")
    ended = run("job.yaml", engine="real", environ={"PYTHONPATH": str(tmp_path)})
    must_say(ended, 2, "installation", "libwanted.so")
    assert "Traceback" not in ended.stderr


def test_the_first_step_ends_the_start_up(tmp_path: Path) -> None:
    """The last line and the log say how long it took, also where one step is all there is."""
    place = Place(str(tmp_path))
    place.write_parquet("in/a.parquet", rows(2))
    path = write_job(tmp_path, job(place, sampling={"max_tokens": 1}))
    ended = run(path, "--limit", "1")
    assert ended.result["startup_s"] > 0, ended.stderr
    log = Path(place.url("out", "_batchinfer", "logs", "0001.log")).read_text()
    assert log.count("started_up") == 1
    assert run(path).result["startup_s"] > 0
    assert run(path).result["startup_s"] is None  # nothing to compute
