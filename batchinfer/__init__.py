"""Offline batch inference on vLLM or llama.cpp: Parquet in, Parquet out, durable and resumable.

The public surface is the command line, the job file, and the names below (docs/python.md). Each is
imported when it is first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchinfer.api import run, scan
    from batchinfer.config import Job
    from batchinfer.errors import BatchInferError
    from batchinfer.telemetry import Outcome

__version__ = "0.1.0"

__all__ = ["BatchInferError", "Job", "Outcome", "__version__", "run", "scan"]

_HOMES = {
    "BatchInferError": "batchinfer.errors",
    "Job": "batchinfer.config",
    "Outcome": "batchinfer.telemetry",
    "run": "batchinfer.api",
    "scan": "batchinfer.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
