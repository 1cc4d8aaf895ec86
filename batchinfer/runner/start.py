"""What one start is asked to do, and where: the job with its model, its input and its output.

Reads the model folder's facts and lists the input; both stay what they are, whoever works on the
output, so they are looked at once, without a lease. Must not know: leases, what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.config import InputSettings, Job, S3Settings, load_job
from batchinfer.engine.base import EngineKind, EngineSpec
from batchinfer.engine.kinds import engine_kind
from batchinfer.model import ModelFacts
from batchinfer.runner.begun import model_for
from batchinfer.runner.checks import check_layout
from batchinfer.runner.digest import Identity, identity_of
from batchinfer.runner.executor import check_executor
from batchinfer.runner.factory import ModelReader
from batchinfer.runner.obstacles import check_records, check_results
from batchinfer.runner.options import RunOptions
from batchinfer.source import RowFilter, Shard, list_shards
from batchinfer.storage import S3Options, Store, open_store
from batchinfer.tasks import Task, task_of

#: Somebody sits and waits for the answer.
_LOOK_RETRY_S = 15.0


@dataclass(frozen=True, slots=True)
class Start:
    """A job, its options and its places. `shards`: the whole input, by name."""

    job: Job
    task: Task
    kind: EngineKind
    options: RunOptions
    model: ModelFacts
    identity: Identity
    store: Store
    shards: Sequence[Shard]
    row_filter: RowFilter | None

    @property
    def spec(self) -> EngineSpec:
        """What the engine is asked about, and built from."""
        return EngineSpec(self.job, self.model, self.task.demand)

    @property
    def own(self) -> list[Shard]:
        """The shards of this start's slice."""
        if self.options.slice is None:
            return list(self.shards)
        index, count = self.options.slice
        return list(self.shards[index - 1 :: count])


def open_start(
    job: Job, options: RunOptions | None = None, should_stop: Callable[[], bool] = lambda: False
) -> Start:
    """Open the output, read the model's facts, list the input.

    `should_stop`: whether storage is to give up retrying. Raises ConfigError for a model, an input
    or an output that cannot be, InputError for an input without files.
    """
    options = options or RunOptions()
    check_executor(job)
    store = open_output(job, should_stop)
    check_records(store)
    task, kind = task_of(job), engine_kind(job.engine.name)
    model = model_for(
        ModelReader.of(job, task, kind),
        store,
        is_restart=options.restart,
        is_whole_input=options.is_whole,
    )
    shards = list_input(job.input, should_stop)
    check_layout(job, task, store, shards)
    check_results(store, shards)
    return Start(
        job=job,
        task=task,
        kind=kind,
        options=options,
        model=model,
        identity=identity_of(job, model),
        store=store,
        shards=shards,
        row_filter=RowFilter(job.input.filter) if job.input.filter else None,
    )


def open_output(job: Job, should_stop: Callable[[], bool]) -> Store:
    return open_store(
        job.output.path,
        s3=_s3_options(job.output.s3),
        should_stop=should_stop,
        single_writer=job.output.single_writer,
    )


def list_input(settings: InputSettings, should_stop: Callable[[], bool]) -> list[Shard]:
    """All shards of the input, by name.

    Raises InputError if there are none or two would collide.
    """
    return list_shards(settings.path, lambda url: open_input_folder(url, settings, should_stop))


def open_input_folder(url: str, settings: InputSettings, should_stop: Callable[[], bool]) -> Store:
    """A folder of the input."""
    return open_store(url, s3=_s3_options(settings.s3), should_stop=should_stop)


def _s3_options(settings: S3Settings) -> S3Options:
    return S3Options(**settings.model_dump())


def open_location(output: str) -> Store:
    """The store of an output: its folder or s3:// location, or the job file that names it."""
    if output.endswith((".yaml", ".yml")) and Path(output).is_file():
        return open_output(load_job(output).job, lambda: False)
    return open_store(output, retry_s=_LOOK_RETRY_S)
