"""How model facts and engine come from a job.

The only place that joins job, model folder and the kind of engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchinfer.config import Job
from batchinfer.engine.base import Engine, EngineKind, EngineSpec
from batchinfer.engine.kinds import check_demand, engine_kind
from batchinfer.model import ModelFacts, read_model
from batchinfer.model.weights import read_weights
from batchinfer.quantization import Begun, Machine
from batchinfer.tasks import Task, task_of


@dataclass(frozen=True, slots=True)
class ModelReader:
    """The job's model folder as the job's engine would run it on this machine."""

    job: Job
    machine: Machine
    needs_weights: bool

    @classmethod
    def of(cls, job: Job, task: Task, kind: EngineKind) -> ModelReader:
        """Raises ConfigError for settings that the engine refuses whatever the model."""
        check_demand(job, task.demand)
        return cls(job, kind.machine(), kind.needs_weights(job))

    def read(self, begun: Begun | None = None) -> ModelFacts:
        """`begun`: see `read_model`. Raises ConfigError."""
        return read_model(
            self.job.model,
            machine=self.machine,
            needs_weights=self.needs_weights,
            begun=begun,
        )


def model_of(job: Job) -> ModelFacts:
    """Facts of the job's model folder, without an output. Raises ConfigError."""
    return ModelReader.of(job, task_of(job), engine_kind(job.engine.name)).read()


def engine_spec(job: Job, model: ModelFacts) -> EngineSpec:
    """What the job's engine is asked about, and built from."""
    return EngineSpec(job, model, task_of(job).demand)


def with_weights(spec: EngineSpec) -> EngineSpec:
    """A spec whose model is there; a checkpoint that is made once is made first.

    Raises ConfigError, TransientError.
    """
    model = spec.model
    if model.made_by is None:
        return spec
    from batchinfer.making.cached import cached_checkpoint

    folder = cached_checkpoint(model)
    weights_bytes = read_weights(folder).size_bytes
    return replace(spec, model=replace(model, path=str(folder), weights_bytes=weights_bytes))


def build_engine(kind: EngineKind, spec: EngineSpec) -> Engine:
    """The engine with the model loaded, made first if need be.

    Raises ConfigError, TransientError.
    """
    return kind.build(with_weights(spec))
