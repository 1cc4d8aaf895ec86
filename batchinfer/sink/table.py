"""Results of one window -> one Arrow table, sorted by (row, sample).

Must not know: files, what a task's columns mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from batchinfer.tasks import Detokenize, Result, Task
from batchinfer.tasks.base import row_values


def build_table(
    results: Sequence[Result],
    schema: pa.Schema,
    *,
    run: int,
    task: Task,
    detokenize: Detokenize,
) -> pa.Table:
    """All columns of `schema` for results of one shard, sorted by (row, sample)."""
    results = _sorted(results)
    done = [r.answer for r in results]
    columns: dict[str, Any] = {
        "shard": pa.repeat(pa.scalar(results[0].chunk.shard, pa.string()), len(results)),
        "row": pa.array(row_values(results, lambda c: c.rows), pa.int64()),
        "sample": pa.array([r.sample for r in results], pa.int32()),
        **task.arrays(results, detokenize),
        "queued_s": pa.array([c.timing.queued_s for c in done], pa.float32()),
        "prefill_s": pa.array([c.timing.prefill_s for c in done], pa.float32()),
        "decode_s": pa.array([c.timing.decode_s for c in done], pa.float32()),
        "total_s": pa.array([c.timing.total_s for c in done], pa.float32()),
        "finished_at": pa.array([r.finished_at_us for r in results], pa.timestamp("us", tz="UTC")),
        "attempt": pa.repeat(pa.scalar(run, pa.int32()), len(results)),
        "duplicate_of": pa.array([r.duplicate_of for r in results], pa.int64()),
        "error_type": pa.array([c.error_type for c in done], pa.string()),
        "error_message": pa.array([c.error_message for c in done], pa.string()),
    }
    carried = _carried(results)
    arrays = [carried[f.name] if f.name in carried else columns[f.name] for f in schema]
    return pa.table(arrays, schema=schema)


def _sorted(results: Sequence[Result]) -> list[Result]:
    """In the order of (row, sample)."""
    rows = row_values(results, lambda c: c.rows)
    samples = np.array([r.sample for r in results], np.int64)
    return [results[i] for i in np.lexsort((samples, rows)).tolist()]


def _carried(results: Sequence[Result]) -> dict[str, pa.ChunkedArray]:
    """The id and kept columns of the results' rows; they may come from several chunks of the
    window.

    One take for each chunk: a take from several at once copies them whole first.
    """
    taken = []
    for _, group in groupby(results, key=lambda result: id(result.chunk)):
        of_chunk = list(group)
        indices = pa.array([r.index for r in of_chunk], pa.int64())
        taken.append(of_chunk[0].chunk.carried.take(indices))
    table = pa.concat_tables(taken)
    return dict(zip(table.column_names, table.columns, strict=True))
