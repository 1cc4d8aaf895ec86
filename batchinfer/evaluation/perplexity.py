"""Perplexity of a model on a text: windows -> a score job -> its finished output -> a record.

Must not know: how an engine is driven, terminals.
"""

from __future__ import annotations

from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.evaluation.record import Record, Request


def measure(request: Request, *, work: Path) -> Record:
    """What `request` asks for, computed where it is not yet.

    `work`: a folder of this request's own; its windows, the job's output and the record are kept
    there, so a call after an interruption goes on, and one after the end computes nothing. The
    engine runs in this process and holds its memory until the process ends. Raises what
    `batchinfer.run` raises: ConfigError and InputError for what cannot be measured.
    """
    raise ConfigError("perplexity is not measured yet in this version")
