"""Several `batchinfer run`s of the real engine, for the price of one import, or of none.

    python -m tests.support.run_many JOB...

vLLM's imports are most of a small run's time. In an environment that a fork cannot be given (see
`tests.support.forks`), this process imports once, and each job runs in a fork of it, from the
command line's own entry to its `os._exit`. Writes a line for each job: its exit code, and the last
line of its stdout. What one of them prints on stderr goes to ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from batchinfer.cli import main
from batchinfer.engine.vllm.setup import prepare_environment
from tests.support.forks import forks, python_path
from tests.support.jobs import run


def run_many(
    *paths: Path, timeout_s: float = 280, environ: Mapping[str, str] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """Run jobs one after the other: (exit code, JSON line) of each."""
    if forks("real").can_give(os.environ | {"PYTHONPATH": python_path()} | dict(environ or {})):
        ended = [run(path, engine="real", timeout_s=timeout_s, environ=environ) for path in paths]
        return [(one.code, one.result) for one in ended]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.run_many", *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=timeout_s,
        check=True,
        env=os.environ | dict(environ or {}),
    )
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return [(int(code), json.loads(text)) for code, _, text in lines]


def engine_facts(file: str) -> dict[str, Any]:
    """What ran, as a finished file's footer says it."""
    facts: dict[str, Any] = json.loads(pq.read_metadata(file).metadata[b"batchinfer"])["engine"]
    return facts


def run_in_fork(job: str) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as stdout:
        pid = os.fork()
        if pid == 0:
            os.dup2(stdout.fileno(), 1)
            sys.argv[1:] = ["run", job]
            main()
            os._exit(1)  # a run ends the process itself
        _, status = os.waitpid(pid, 0)
        stdout.seek(0)
        lines = stdout.read().splitlines()
    return os.waitstatus_to_exitcode(status), lines[-1] if lines else "{}"


if __name__ == "__main__":
    prepare_environment(weights_bytes=0, is_local_model=True)
    from batchinfer.engine.vllm.engine import import_engine

    import_engine()
    for path in sys.argv[1:]:
        code, line = run_in_fork(path)
        sys.stdout.write(f"{code} {line}\n")
        sys.stdout.flush()
