"""job.json, and what to do where it is missing: made, made again from what runs and parts say.

Must not know: leases, what is computed. Invariant: parts are never taken for another job's or
another input's; where runs and parts do not say enough, nothing is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from batchinfer.config import Job
from batchinfer.errors import ConfigError, TransientError
from batchinfer.ledger import Survey, layout, list_parts, read_facts, read_schema, records
from batchinfer.runner.begun import differs_by_machine
from batchinfer.runner.carried import RECORD_KEY, to_text
from batchinfer.runner.checks import other_settings
from batchinfer.runner.digest import Identity
from batchinfer.storage import Store

logger = logging.getLogger("batchinfer.runner")


def create_record(
    store: Store, record: dict[str, Any], identity: Identity, *, is_whole: bool
) -> bytes:
    """Write job.json and return it as it is. Raises if another slice began with something else."""
    content = records.to_json(record)
    if store.create(layout.JOB_KEY, content):
        return content
    found = records.read_json(store, layout.JOB_KEY)
    if found is not None and is_whole:
        store.delete([layout.JOB_KEY])  # it has no result, see earlier_record
        store.create(layout.JOB_KEY, content)
        return content
    if found is not None and (changes := identity.changes_since(found)):
        if differs_by_machine(changes):
            raise TransientError(
                f"another start began {store.url} at the same moment, on a machine where "
                "model.dtype or model.quantization became another: start again to go on in it"
            )
        raise other_settings(store, changes)
    bound = ("digest", "window_rows", RECORD_KEY)
    if found is None or any(found.get(name) != record.get(name) for name in bound):
        raise TransientError(
            f"another run began {store.url} at the same moment, with another packing.window_rows, "
            "other input files or another version of batchinfer: start again"
        )
    return records.to_json(found)


def rebuilt_record(store: Store, survey: Survey, digest: str, job: Job) -> dict[str, Any] | None:
    """What a job.json that somebody deleted said of the results that are left; None without any.

    Footers of parts say it, and the records of runs which input they were computed from. Raises
    ConfigError if those do not say enough.
    """
    if not survey.has_results:
        return None
    window_rows = set() if survey.with_parts else {job.packing.window_rows}
    schemas = {to_text(_carried(store, key, job)) for key in survey.finished}
    for shard in survey.with_parts:
        for part in list_parts(store, shard):
            key = layout.part_key(shard, part)
            facts = read_facts(store, key) or {}
            window_rows.add(int(facts["window_rows"]) if facts.get("digest") == digest else 0)
            schemas.add(to_text(_carried(store, key, job)))
    known: set[str] = set()
    for info in store.list(layout.RUNS_PREFIX):
        record = records.read_json(store, info.key) or {}
        if record.get("digest") == digest:
            known |= {entry[0] for entry in record["input"]}
    if len(window_rows) != 1 or 0 in window_rows or not survey.with_parts <= known:
        raise ConfigError(
            f"{store.url_of(layout.JOB_KEY)} is missing, but there are parts of a run: they cannot "
            "be understood without it. Put it back, start with --restart, or choose another "
            "output.path"
        )
    logger.warning(
        "%s was missing: written again from what the parts and runs say",
        store.url_of(layout.JOB_KEY),
    )
    rebuilt = {"digest": digest, "window_rows": window_rows.pop(), "first_run": 1}
    return rebuilt | ({RECORD_KEY: schemas.pop()} if len(schemas) == 1 else {})


def _carried(store: Store, key: str, job: Job) -> pa.Schema:
    """Types of the columns from the input in a file of results; none in a file of another kind."""
    schema = read_schema(store, key)
    names = [name for name in ("id", *job.input.keep_columns) if name in schema.names]
    return pa.schema([pa.field(name, schema.field(name).type) for name in names])


def restore(store: Store, written: Mapping[str, bytes]) -> None:
    """Write records again that somebody deleted while the run that wrote them works."""
    for key, content in written.items():
        if store.stat(key) is None and store.create(key, content):
            logger.warning("%s was deleted while the run worked: written again", store.url_of(key))
