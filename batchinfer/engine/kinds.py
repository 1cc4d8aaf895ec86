"""The engines by the name that a job gives, `engine.name`.

An engine is a folder here that is named as in config's ENGINES, whose module `kind` has a `KIND`:
a new one changes nothing here. Must not know: any engine.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

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


def demands_in(folder: ModuleType) -> tuple[str, ...]:
    """What an engine can give a task: the modules of its folder `demands`."""
    return tuple(module.name for module in pkgutil.iter_modules(folder.__path__))


def check_demand(job: Job, demand: Demand) -> None:
    """Raise ConfigError for what the job's engine refuses, before the model is looked at.

    A task that it was never taught among that: it would compute something else.
    """
    kind = engine_kind(job.engine.name)
    if demand.wants not in kind.wants:
        raise ConfigError(f"engine.name: {job.engine.name} does not run task: {demand.task}")
    kind.check(job, demand)
