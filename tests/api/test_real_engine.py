"""The Python door with the real engine: a program that runs a job, and reads its results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import ROOT, Place, job, rows, write_job

pytestmark = pytest.mark.real_engine

PROGRAM = """
import gc, signal, sys
import batchinfer

if __name__ == "__main__":
    before = signal.getsignal(signal.SIGTERM)
    outcome = batchinfer.run(sys.argv[1], overrides={"sampling.max_tokens": 4})
    assert signal.getsignal(signal.SIGTERM) == before and gc.isenabled()
    results = batchinfer.scan(outcome.output).collect()
    print(outcome.status, len(results), results["num_completion_tokens"].max())
"""


def test_a_program_runs_a_job_on_the_real_engine(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(6))
    path = write_job(tmp_path, job(folder, model={"max_model_len": 256}))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = subprocess.run(
        [sys.executable, str(program), str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "complete 6 4"
