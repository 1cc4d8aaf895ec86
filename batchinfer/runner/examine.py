"""A job as `run` would find it: its start, its output, what is decided, and the input's footers.

Writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.config import Job
from batchinfer.ledger import Results
from batchinfer.model import ModelFacts
from batchinfer.runner.beside import find_beside, warn_of_beside
from batchinfer.runner.carried import carried_columns, carried_schema
from batchinfer.runner.checks import check_schema, check_shards
from batchinfer.runner.decide import (
    Complete,
    Decision,
    Refused,
    Restart,
    Resume,
    accepted,
    decide,
)
from batchinfer.runner.input import refuse_changed
from batchinfer.runner.look import OutputView, look
from batchinfer.runner.restart import warn_of_pending
from batchinfer.runner.start import Start
from batchinfer.source import Footer, RowFilter, Shard, read_footer
from batchinfer.storage import Store


@dataclass(frozen=True, slots=True)
class ExaminedJob:
    """A job with everything that can be known of it without a model in memory."""

    start: Start
    view: OutputView
    decision: Decision  # what a start would do with the output
    footers: list[Footer]
    carried: pa.Schema | None  # the id and kept columns of the output

    @property
    def job(self) -> Job:
        return self.start.job

    @property
    def model(self) -> ModelFacts:
        return self.start.model

    @property
    def shards(self) -> Sequence[Shard]:
        return self.start.shards

    @property
    def store(self) -> Store:
        return self.start.store

    @property
    def row_filter(self) -> RowFilter | None:
        return self.start.row_filter


def examine(start: Start) -> ExaminedJob:
    """Raises InputError unless the output can hold the id and kept columns of all shards."""

    def check(shard: Shard) -> Footer:
        footer = read_footer(shard)
        check_schema(start.job, start.task, start.row_filter, shard, footer)
        return footer

    footers = check_shards(start.shards, check)
    view = look(start)
    decision = decide(start, view)
    # One that is refused does not bind the job: whoever needs it to be accepted calls `accept`.
    record = None if isinstance(decision, Refused) else decision.record
    columns = (carried_columns(start.job, footer) for footer in footers)
    carried = carried_schema(start.job, zip(start.shards, columns, strict=True), record)
    return ExaminedJob(start, view, decision, footers, carried)


def accept(looked: ExaminedJob) -> Complete | Resume:
    """What a start would do with the output. Raises what it would refuse this job for."""
    start, view, decision = looked.start, looked.view, accepted(looked.decision)
    if view.pending is not None:
        warn_of_pending(view.url, view.pending)
    if isinstance(decision, Resume):
        refuse_changed(start, decision, view.survey)
    if not isinstance(decision, Restart):
        results = Results(start.store, decision.digest)
        warn_of_beside(results, find_beside(results, view.survey, (s.name for s in start.shards)))
    return decision
