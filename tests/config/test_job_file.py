"""What may stand where a job file is expected, and variables that are no settings."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from batchinfer.config import load_job
from batchinfer.config.job_file import read_document
from batchinfer.engine.vllm.setup import OWNER_PID_VARIABLE, PLUGINS_VARIABLE
from batchinfer.errors import ConfigError
from batchinfer.native import PREBUILT
from tests.support.jobs import ROOT

JOB = ROOT / "jobs" / "summarize.yaml"


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a pipe that nobody writes to"),
        (Path.mkdir, "is a folder, not a job file"),
        (bind, "is a socket, not a job file"),
    ],
)
def test_a_job_path_that_is_not_a_file_is_named_and_not_waited_for(
    make: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name may have 107 bytes
    make(Path("job.yaml"))
    started_s = time.monotonic()
    with pytest.raises(ConfigError, match=rf"job\.yaml: {words}"):
        load_job("job.yaml")
    assert time.monotonic() - started_s < 30


def test_an_empty_name_is_called_empty() -> None:
    with pytest.raises(ConfigError, match="the name of the job file is empty"):
        load_job("")


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_a_pipe_with_a_slow_writer_is_read_to_its_end(wait_s: float, tmp_path: Path) -> None:
    pipe = tmp_path / "job.yaml"
    os.mkfifo(pipe)

    def write() -> None:
        time.sleep(wait_s)
        with pipe.open("wb", buffering=0) as sink:
            time.sleep(wait_s)
            sink.write(b"version: 1\n")
            time.sleep(wait_s)
            sink.write(b"name: x\n" + b"# long\n" * 20_000)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_document(str(pipe)).data == {"version": 1, "name": "x"}
    writer.join()


@pytest.mark.parametrize(
    "command", ["{0} <(sleep 0.3; cat {1})", "{0} /dev/stdin < {1}", "cat {1} | {0} /dev/stdin"]
)
def test_what_a_shell_puts_there_is_read(command: str) -> None:
    explain = f"{sys.executable} -m batchinfer explain"
    shell = subprocess.run(
        ["bash", "-c", command.format(explain, JOB)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shell.returncode == 0, shell.stderr
    assert "model.path" in shell.stdout


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("BATCHINFER_SAMPLING_TEMPERATURE", "BATCHINFER__SAMPLING__TEMPERATURE"),
        ("BATCHINFER_SAMPLING__TEMPERATURE", "BATCHINFER__SAMPLING__TEMPERATURE"),
        ("BATCHINFER_SAMPLNG_TEMPERATURE", "BATCHINFER__SAMPLING__TEMPERATURE"),
        ("BATCHINFER_OUTPUT_PATH", "BATCHINFER__OUTPUT__PATH"),
        ("BATCHINFER_XYZZY", "BATCHINFER__SECTION__KEY"),
    ],
)
def test_a_variable_that_sets_nothing_is_said(
    variable: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_job(JOB, environ={variable: "0"})
    (said,) = caplog.messages
    assert f"{variable} sets nothing" in said and meant in said


@pytest.mark.parametrize(
    "variable",
    [
        *(PREBUILT, OWNER_PID_VARIABLE, PLUGINS_VARIABLE, "BATCHINFER__SAMPLING__MAX_TOKENS"),
        *("BATCHINFER_PORT", "BATCHINFER_SERVICE_HOST", "BATCHINFER_SERVICE_PORT_HTTP"),
        *("BATCHINFER_PORT_80_TCP_ADDR", "BATCHINFERENCE_HOME", "HOME"),
    ],
)
def test_other_variables_are_not_spoken_of(variable: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        load_job(JOB, environ={variable: "7"})
    assert not caplog.messages
