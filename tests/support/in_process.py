"""`run` on the fake engine inside the test's own process: for many runs, and for faults below."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from batchinfer.config import load_job
from batchinfer.engine.kinds import KINDS
from batchinfer.errors import BatchInferError, exit_code_of
from batchinfer.prompt import encode
from batchinfer.runner import Host, RunOptions, run_job
from batchinfer.telemetry import Clock, Counters
from batchinfer.testing import FakePlan, LightTokenizer
from tests.support.fake_run import fake_kinds


@dataclass(frozen=True, slots=True)
class EndedHere:
    """How a run ended, as its process would have: `code` is 1 for what nobody foresaw."""

    code: int
    message: str
    error: BaseException | None = None


def run_here(
    path: Path, options: RunOptions | None = None, fake: dict[str, Any] | None = None
) -> EndedHere:
    """No signals, no log file, no last line; everything else as in a process of its own."""
    try:
        with (
            mock.patch.object(encode, "_load", lambda path, **_: LightTokenizer(path)),
            mock.patch.dict(KINDS, fake_kinds(FakePlan(**(fake or {})))),
        ):
            job = load_job(str(path), []).job
            outcome = run_job(job, options or RunOptions(), Host(Counters(Clock())))
    except Exception as error:
        code = exit_code_of(error) if isinstance(error, BatchInferError) else 1
        return EndedHere(code, str(error), error)
    return EndedHere(outcome.exit_code, outcome.message)
