"""Rows that are read and tokenized -> chunks; and the results of those that never meet an engine.

Must not know: files, threads, which rows are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.config import Job
from batchinfer.engine.base import Answer
from batchinfer.errors import RowError
from batchinfer.plan import Chunk
from batchinfer.plan.chunk import own_bytes
from batchinfer.prompt import Prepared, joined_counts, joined_own
from batchinfer.runner.claims import Claim
from batchinfer.tasks import Result, task_of


@dataclass(slots=True)
class Gathered:
    """Rows of a window, on their way to a chunk."""

    rows: list[npt.NDArray[np.int64]] = field(default_factory=list)
    todo: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    carried: list[pa.Table] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0

    def add(
        self,
        rows: npt.NDArray[np.int64],
        todo: npt.NDArray[np.bool_],
        prepared: Prepared,
        carried: pa.Table,
    ) -> None:
        """`rows` [n], `todo` [n, samples], and what became of them."""
        self.rows.append(rows)
        self.todo.append(todo)
        self.prepared.append(prepared)
        self.carried.append(carried)
        self.num_tokens += len(prepared.token_ids)
        self.num_bytes += carried.nbytes + own_bytes(prepared.own)


def build_chunk(job: Job, claim: Claim, window: int, gathered: Gathered) -> Chunk:
    """Empties `gathered` as it goes: all token ids twice would be too much."""
    errors: dict[int, RowError] = {}
    offsets = [np.zeros(1, np.int64)]
    token_ids = np.empty(gathered.num_tokens, np.int32)
    num_rows = num_tokens = 0
    counts = joined_counts(gathered.prepared)
    own = joined_own(gathered.prepared)
    pieces, gathered.prepared = gathered.prepared[::-1], []
    while pieces:  # each is freed once it is copied
        prepared = pieces.pop()
        errors |= {num_rows + index: error for index, error in prepared.errors.items()}
        offsets.append(prepared.offsets[1:] + num_tokens)
        token_ids[num_tokens : num_tokens + len(prepared.token_ids)] = prepared.token_ids
        num_rows += len(prepared.offsets) - 1
        num_tokens += len(prepared.token_ids)
    return Chunk(
        shard=claim.shard.name,
        window=window,
        rows=np.concatenate(gathered.rows),
        token_ids=token_ids,
        offsets=np.concatenate(offsets),
        carried=pa.concat_tables(gathered.carried).combine_chunks(),  # parts take rows of it
        errors=errors,
        is_todo=np.concatenate(gathered.todo),
        deduplicate=job.packing.deduplicate and task_of(job).is_repeatable,
        counts=counts,
        own=own,
        claim=claim.name,
    )


def error_results(chunk: Chunk, finished_at_us: int) -> Iterator[Result]:
    """The results of rows that cannot become a prompt."""
    for index, error in chunk.errors.items():
        for sample in np.flatnonzero(chunk.is_todo[index]).tolist():
            answer = Answer(key=-1, error_type=error.kind, error_message=error.message)
            yield Result(chunk, index, sample, answer, finished_at_us)
