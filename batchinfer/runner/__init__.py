"""One run of a job: read, render, submit, step, write, commit. Must not know: click, terminals."""

from batchinfer.runner.context import (
    RunContext,
    outcome_of,
    release,
    write_status,
)
from batchinfer.runner.options import RunOptions
from batchinfer.runner.run import run_job
from batchinfer.runner.session import Session
from batchinfer.runner.stop import StopControl

__all__ = [
    "RunContext",
    "RunOptions",
    "Session",
    "StopControl",
    "outcome_of",
    "release",
    "run_job",
    "write_status",
]
