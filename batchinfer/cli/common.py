"""What several commands share: model facts, input listing, output location.

Writes nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from batchinfer.cli.places import explained_places
from batchinfer.config import Job, load_job
from batchinfer.ledger import layout, records
from batchinfer.model import ModelFacts
from batchinfer.runner.begun import model_for
from batchinfer.runner.carried import carried_columns, carried_schema
from batchinfer.runner.checks import check_layout, check_schema, check_shards
from batchinfer.runner.digest import identity_of
from batchinfer.runner.session import list_input, open_output
from batchinfer.source import Footer, RowFilter, Shard, read_footer
from batchinfer.storage import Store, open_store

logger = logging.getLogger("batchinfer.cli")

#: Somebody sits and waits for the answer.
_LOOK_RETRY_S = 15.0


@dataclass(frozen=True, slots=True)
class Looked:
    """A job with everything that can be known of it without a model in memory."""

    job: Job
    model: ModelFacts
    shards: list[Shard]
    footers: list[Footer]
    store: Store
    row_filter: RowFilter | None
    carried: pa.Schema | None  # the id and kept columns of the output


def never() -> bool:
    return False


def look_at(job: Job, job_path: str) -> Looked:
    """Check model folder, input and output as `run` does. Raises ConfigError, InputError."""
    with explained_places(job, job_path):
        return _look_at(job)


def _look_at(job: Job) -> Looked:
    store = open_output(job, never)
    model = model_for(job, store)
    for warning in model.warnings:
        logger.warning("%s", warning)
    shards = list_input(job, never)
    check_layout(job, store, shards)
    row_filter = RowFilter(job.input.filter) if job.input.filter else None

    def check(shard: Shard) -> Footer:
        footer = read_footer(shard)
        check_schema(job, row_filter, shard, footer)
        return footer

    footers = check_shards(shards, check)
    carried = _carried(job, model, store, shards, footers)
    return Looked(job, model, shards, footers, store, row_filter, carried)


def _carried(
    job: Job, model: ModelFacts, store: Store, shards: list[Shard], footers: list[Footer]
) -> pa.Schema | None:
    """Raises InputError unless the output can hold the id and kept columns of all shards."""
    record = records.read_json(store, layout.JOB_KEY)
    if record is not None and identity_of(job, model).changes_since(record):
        record = None  # of another job: it is refused or replaced, and does not bind this one
    columns = (carried_columns(job, footer) for footer in footers)
    return carried_schema(job, zip(shards, columns, strict=True), record)


def open_output_location(output: str) -> Store:
    """The store of an output: its folder or s3:// location, or the job file that names it."""
    if output.endswith((".yaml", ".yml")) and Path(output).is_file():
        return open_output(load_job(output).job, never)
    return open_store(output, retry_s=_LOOK_RETRY_S)
