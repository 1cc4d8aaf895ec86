"""What a command does whose stdout or stderr takes nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.jobs import Ended, Place, job, rows, run, start, wait, write_job

COMMANDS = [
    ("--help",),
    ("run", "--help"),
    ("schema",),
    ("explain", "jobs/summarize.yaml"),
    ("plan", "jobs/summarize.yaml", "--no-tokenizer"),
    ("doctor",),
]


@contextmanager
def broken_pipe() -> Iterator[int]:
    """The end for writing of a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def run_into(stdout: int, *arguments: str) -> Ended:
    process = start(
        arguments[-1], command=arguments[:-1], engine="real", stdout=stdout, is_fresh=True
    )
    return wait(process)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_is_reported_in_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run_into(full.fileno(), *arguments)
    assert ended.code == 75
    (line,) = ended.stderr.splitlines()
    assert "cannot write to stdout: No space left on device" in line


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_reader_that_went_away_ends_a_command_silently(arguments: tuple[str, ...]) -> None:
    """As SIGPIPE ends other tools: not with 0, as not all that it was to do is done."""
    with broken_pipe() as pipe:
        ended = run_into(pipe, *arguments)
    assert (ended.code, ended.stderr) == (141, "")


def test_an_error_keeps_its_code_where_stderr_is_full() -> None:
    shell = 'exec "$0" -m batchinfer validate nowhere.yaml 2>/dev/full'
    ended = subprocess.run(["bash", "-c", shell, "python"], capture_output=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (2, b"")


def test_a_last_line_that_could_not_be_written_is_told(tmp_path: Path) -> None:
    """The work is done; who waits for the line is told that it is not there, and gets it later."""
    place = Place(str(tmp_path))
    place.write_parquet("in/a.parquet", rows(3))
    path = write_job(tmp_path, job(place))
    with Path("/dev/full").open("w") as full:
        ended = wait(start(path, stdout=full))
        assert ended.code == 75
        assert "cannot write the last line to stdout: No space left" in ended.stderr
        assert wait(start(path, "--slice", "1/0", stdout=full)).code == 2
    with broken_pipe() as pipe:
        assert wait(start(path, stdout=pipe)).code == 0
    assert json.loads(run(path).stdout)["status"] == "complete"
