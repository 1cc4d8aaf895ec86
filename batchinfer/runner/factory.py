"""How model facts and engine come from a job.

The only place that joins job, model folder and the kind of engine.
"""

from __future__ import annotations

from dataclasses import replace

from batchinfer.config import Job
from batchinfer.engine.base import Engine, EngineSpec
from batchinfer.engine.kinds import engine_kind
from batchinfer.model import ModelFacts, read_model
from batchinfer.model.weights import read_weights
from batchinfer.quantization import Begun
from batchinfer.tasks import task_of


def model_of(job: Job, begun: Begun | None = None) -> ModelFacts:
    """Facts of the job's model folder. `begun`: see `read_model`. Raises ConfigError."""
    kind = engine_kind(job.engine.name)
    kind.check(job, task_of(job).demand)
    return read_model(
        job.model, machine=kind.machine(), needs_weights=kind.needs_weights(job), begun=begun
    )


def engine_spec(job: Job, model: ModelFacts) -> EngineSpec:
    """What the job's engine is asked about, and built from."""
    return EngineSpec(job, model, task_of(job).demand)


def build_engine(job: Job, model: ModelFacts) -> Engine:
    """The job's engine with the model loaded; a checkpoint that is made once is made first.

    Raises ConfigError, TransientError.
    """
    if model.made_by is not None:
        from batchinfer.making.cached import cached_checkpoint

        folder = cached_checkpoint(model)
        weights_bytes = read_weights(folder).size_bytes
        model = replace(model, path=str(folder), weights_bytes=weights_bytes)
    return engine_kind(job.engine.name).build(engine_spec(job, model))
