"""The engines by the name that a job gives, `engine.name`.

An engine is a folder here that is named as in config's ENGINES, whose module `kind` has a `KIND`:
a new one changes nothing here. Must not know: any engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from batchinfer.config import Job
from batchinfer.engine.base import Demand, EngineKind
from batchinfer.errors import ConfigError

#: Of this process alone, before those in folders: what `batchinfer.testing.register` adds.
KINDS: dict[str, Callable[[], EngineKind]] = {}


def engine_kind(name: str) -> EngineKind:
    """The kind of a job's `engine.name`, which config has checked; imported when first asked."""
    if name in KINDS:
        return KINDS[name]()
    kind: EngineKind = importlib.import_module(f"batchinfer.engine.{name}.kind").KIND
    return kind


def check_demand(job: Job, demand: Demand) -> None:
    """Raise ConfigError for what the job's engine refuses, before the model is looked at.

    A task that it was never taught among that: it would compute something else.
    """
    kind = engine_kind(job.engine.name)
    if demand.wants not in kind.wants:
        raise ConfigError(f"engine.name: {job.engine.name} does not run task: {demand.task}")
    kind.check(job, demand)
