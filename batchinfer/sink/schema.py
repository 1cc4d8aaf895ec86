"""The schema of parts and finished files (they are the same): what every task's output has, around
the task's own columns.

Must not know: how values come about. Invariant: the columns depend on the job alone, never on what
a run happened to compute, so every file of an output has the same schema where its input has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa

from batchinfer.tasks import TASKS, Column

#: Raised when a column changes its name, type or meaning: it is part of the job digest.
SCHEMA_VERSION = 1

#: name -> (type, description), in order: before the task's columns, after `id` and the kept ones.
KEY_COLUMNS: Mapping[str, Column] = {
    "shard": (pa.string(), "the input file, relative to the longest glob-free prefix"),
    "row": (pa.int64(), "row number in the input file, from 0"),
    "sample": (pa.int32(), "0 .. sampling.n - 1; (shard, row, sample) is the key of a result"),
}

#: The same behind the task's columns.
END_COLUMNS: Mapping[str, Column] = {
    "queued_s": (pa.float32(), "seconds from admission to the first scheduled step"),
    "prefill_s": (pa.float32(), "seconds from there to the first token"),
    "decode_s": (pa.float32(), "seconds from the first to the last token"),
    "total_s": (pa.float32(), "seconds from admission to the last token"),
    "finished_at": (pa.timestamp("us", tz="UTC"), "when the row was finished"),
    "attempt": (pa.int32(), "number of the run that computed the row (runs/NNNN.json)"),
    "duplicate_of": (pa.int64(), "row of this shard with the same prompt whose result was used"),
    "error_type": (pa.string(), "null for a result; otherwise why there is none"),
    "error_message": (pa.string(), "the same as a sentence"),
}
#: Of both, those of few different values.
_REPEATING = ("shard", "sample", "attempt", "error_type")


def repeating_columns() -> Iterator[str]:
    """Names of columns that have few different values, of all tasks."""
    yield from _REPEATING
    for kind in TASKS.values():
        yield from kind.repeating


def output_columns(task_columns: Mapping[str, Column]) -> dict[str, Column]:
    """All columns of ours, in the order of the file."""
    return {**KEY_COLUMNS, **task_columns, **END_COLUMNS}


def output_schema(carried: list[pa.Field], task_columns: Mapping[str, Column]) -> pa.Schema:
    """Schema of an output file: the carried fields (`id` first), then ours."""
    columns = output_columns(task_columns)
    return pa.schema([*carried, *(pa.field(name, kind) for name, (kind, _) in columns.items())])
