"""What of a job concerns a server: its model, its engine, how tokens are chosen.

The model and the engine are looked at as for a run, by the same functions; the output is not, so
neither does what it was begun with bind a server. Nothing here writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from batchinfer.config import ENGINES, Job
from batchinfer.engine.base import EngineSpec, ServingKind
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.kinds import check_demand, engine_kind
from batchinfer.errors import ConfigError
from batchinfer.runner.factory import engine_spec, model_of

#: From SIGTERM on; schedulers send SIGKILL after 30 s.
DRAIN_S = 15.0
#: What a server's process leaves in its folder when it ends.
REPORT = "report.json"
#: Sections that say what is read and written, and when.
_OF_RUNS = ("input", "packing", "checkpoint", "output", "limits")
#: Of `sampling`: how often a row is computed, and what is told of it. Requests ask for that.
_OF_ROWS = ("n", "logprobs", "prompt_logprobs", "per_row")
#: Of `prompt`: how conversations become text, whoever sends them.
_OF_CHATS = ("chat_template", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class ServerOrder:
    """All that a server's process is told. Pickled: both are the same program.

    `socket_fd`: a descriptor that it inherits. `folder`: of this server alone.
    """

    spec: EngineSpec
    socket_fd: int
    folder: str
    parent_pid: int
    api_key: str | None = field(repr=False)
    logs_requests: bool
    drain_s: float = DRAIN_S


@dataclass(frozen=True, slots=True)
class Service:
    """A job as it is served. `ignored`: keys of it that do not concern a server."""

    spec: EngineSpec
    ignored: list[str]


def prepare(job: Job) -> Service:
    """Look at the job's model as a run does. Raises ConfigError for what cannot be served."""
    if job.task != "generate":
        raise ConfigError(
            f"task: {job.task} cannot be served: a server answers with completions. Set task: "
            "generate, or compute the rows with `batchinfer run`"
        )
    kind = engine_kind(job.engine.name)
    if not isinstance(kind, ServingKind):
        others = [name for name in ENGINES if isinstance(engine_kind(name), ServingKind)]
        raise ConfigError(
            f"engine.name: {job.engine.name} has no server in this version, {' and '.join(others)} "
            "have: give a model for one of them, or compute rows with `batchinfer run`"
        )
    spec = _with_seeds(engine_spec(job, model_of(job)))
    check_demand(job, spec.demand)
    kind.check_fit(spec)
    return Service(spec, ignored_keys(job))


def ignored_keys(job: Job) -> list[str]:
    """What the job says that makes no difference to a server."""
    keys = [name for name in _OF_RUNS if name in job.model_fields_set]
    keys += [f"prompt.{name}" for name in job.prompt.model_fields_set if name not in _OF_CHATS]
    sampling = job.sampling
    keys += [f"sampling.{name}" for name in _OF_ROWS if name in sampling.model_fields_set]
    return sorted(keys, key=_place)


def _place(key: str) -> tuple[int, str]:
    """Where a job file has it."""
    section = key.partition(".")[0]
    return list(Job.model_fields).index(section), key


def _with_seeds(spec: EngineSpec) -> EngineSpec:
    """As any request may bring a seed and a temperature."""
    demand = spec.demand
    assert isinstance(demand, CompletionDemand), "of task: generate"
    sampling = demand.sampling.model_copy(update={"seed": 0, "temperature": 1.0})
    return replace(spec, demand=replace(demand, sampling=sampling))
