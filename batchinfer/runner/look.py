"""The read-only look at an output: its records, one listing, and what its files say of themselves.

Whoever wants to know how an output stands looks: `validate` and `plan` as well as a run, before it
holds the lease and again under it, as all of this is the holder's to change. Must not know: leases,
what follows from what is seen (`decide`). Invariant: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchinfer.errors import TransientError
from batchinfer.ledger import (
    Survey,
    layout,
    list_parts,
    read_facts,
    read_schema,
    records,
    survey,
)
from batchinfer.model import changed_weights
from batchinfer.runner.carried import to_text
from batchinfer.runner.ownership import Neighbours, Origin, find_neighbours, read_origins
from batchinfer.runner.restart import read_pending
from batchinfer.runner.start import Start
from batchinfer.source import Fingerprint
from batchinfer.storage import Store

#: In job.json: what `weight_marks` said when the output was begun.
WEIGHTS_KEY = "weights"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One of runs/NNNN.json: which job the run computed, which shards were new to it."""

    number: int
    digest: str | None
    shards: tuple[Fingerprint, ...]


@dataclass(frozen=True, slots=True)
class Remains:
    """Results without a job.json: what they say of the job that they were computed for."""

    jobs: frozenset[tuple[str | None, int]]  # (digest, window_rows) in the parts' footers
    schemas: frozenset[str]  # of the id and kept columns, as job.json has it
    inputs: frozenset[Fingerprint] = frozenset()  # of shards, where all parts of one say the same


@dataclass(frozen=True, slots=True)
class OutputView:
    """An output at one moment."""

    url: str
    survey: Survey
    success: Mapping[str, Any] | None  # _SUCCESS
    record: Mapping[str, Any] | None  # job.json
    is_restarting: bool  # all results are to be deleted: asked for, or begun and killed
    pending: Mapping[str, Any] | None  # the marker of a restart that was begun and killed
    runs: tuple[RunRecord, ...]
    neighbours: Neighbours
    origins: Mapping[str, Origin]  # of the finished files that no run accounts for, by key
    remains: Remains | None
    changed_weights: tuple[str, ...] = ()  # files that are others than when it was begun

    def recorded_since(self, first_run: int) -> dict[str, Fingerprint]:
        """What each shard looked like when its rows were computed, by name."""
        runs = (run for run in self.runs if run.number >= first_run)
        return {print_.name: print_ for run in runs for print_ in run.shards}


def look(start: Start) -> OutputView:
    """Read everything that a decision is made from.

    Raises ConfigError for records that are not JSON of ours, TransientError.
    """
    try:
        return _look(start)
    except FileNotFoundError as error:
        raise TransientError(
            f"{start.store.url} changed while it was looked at ({error}): another start may be "
            "deleting its results (--restart). Start again"
        ) from error


def _look(start: Start) -> OutputView:
    store = start.store
    success = records.read_success(store)
    record = records.read_job(store)
    pending = read_pending(store)
    is_restarting = start.options.restart or pending is not None
    listed = survey(store)
    names = (shard.name for shard in start.shards)
    others = find_neighbours(store, listed, names, is_begun=record is not None)
    runs = tuple(_runs(store))
    accounted: set[str] = set()
    if record is not None and not is_restarting:
        first_run = int(record["first_run"])
        accounted = {s.name for run in runs if run.number >= first_run for s in run.shards}
    is_lost = record is None and not is_restarting and listed.has_results
    return OutputView(
        url=store.url,
        survey=listed,
        success=success,
        record=record,
        is_restarting=is_restarting,
        pending=pending,
        runs=runs,
        neighbours=others,
        origins=read_origins(store, listed.finished - accounted),
        remains=_remains(start, listed) if is_lost else None,
        changed_weights=() if is_restarting else _changed_weights(start, record),
    )


def _changed_weights(start: Start, record: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The digest knows weights by their shapes. Outputs of earlier versions do not say more."""
    marks = (record or {}).get(WEIGHTS_KEY)
    if not isinstance(marks, dict) or not start.kind.needs_weights(start.job):
        return ()
    return tuple(changed_weights(start.model.path, marks))


def _runs(store: Store) -> Iterator[RunRecord]:
    for info in store.list(layout.RUNS_PREFIX):
        number = layout.run_of_key(info.key)
        record = records.read_run(store, info.key) if number is not None else None
        if number is not None and record is not None:
            shards = (records.fingerprint_from(entry) for entry in record["input"])
            known = tuple(shard for shard in shards if shard is not None)
            yield RunRecord(number, record.get("digest"), known)


def _remains(start: Start, listed: Survey) -> Remains:
    store = start.store
    jobs: set[tuple[str | None, int]] = set()
    schemas = {_carried(start, key) for key in listed.finished}
    inputs = set()
    for shard in listed.with_parts:
        said = []
        for part in list_parts(store, shard):
            key = layout.part_key(shard, part)
            facts = read_facts(store, key) or {}
            jobs.add((facts.get("digest"), int(facts.get("window_rows", 0))))
            schemas.add(_carried(start, key))
            said.append(records.fingerprint_from(facts.get("input")))
        one = _one_input(said)
        if one is not None and one.name == shard:
            inputs.add(one)
    return Remains(frozenset(jobs), frozenset(schemas), frozenset(inputs))


def _one_input(said: Sequence[Fingerprint | None]) -> Fingerprint | None:
    """The last, if all are of one content: a file that was copied has another time."""
    contents = {f and (f.size_bytes, f.footer_sha256, f.num_rows) for f in said}
    return said[-1] if len(contents) == 1 else None


def _carried(start: Start, key: str) -> str:
    """Types of the columns from the input in a file of results; none in a file of another kind."""
    schema = read_schema(start.store, key)
    present = set(schema.names)
    names = [name for name in ("id", *start.job.input.keep_columns) if name in present]
    return to_text(pa.schema([pa.field(name, schema.field(name).type) for name in names]))
