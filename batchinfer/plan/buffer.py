"""A buffer: chunks that are put in order together, and what to request of them, in which order.

Must not know: where chunks come from, engines. Invariant: the items of a buffer are each (row,
sample) of its chunks that needs a request, exactly once, a row's samples next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.plan.chunk import Chunk, WorkItem
from batchinfer.plan.order import by_length, prefix_trees

#: Grouping by prefix has to save so much of all prompt tokens to be worth leaving the order of the
#: rows, or of the windows: rows of several windows in flight finish their shards later.
MIN_SHARED = 0.05
#: Rows of at most this many chunks are mixed: each has a shard or window of its own, which costs a
#: part at every flush until it is done.
MAX_MIXED_CHUNKS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Chunks in order of admission."""

    chunks: Sequence[Chunk]
    chunk_of: npt.NDArray[np.int64]  # [n] for each row that needs a request, in order of admission
    index_of: npt.NDArray[np.int64]  # [n] the row's index in its chunk
    order: str  # "input", "length", "prefix in windows" or "prefix over windows"
    num_prompt_tokens: int  # of the rows that need a request
    num_shared_tokens: int  # of these, saved by the grouping if nothing else stays cached

    def items(self) -> Iterator[WorkItem]:
        """What to request, in order. Made one at a time: a buffer can have 100,000 rows."""
        for number, index in zip(self.chunk_of.tolist(), self.index_of.tolist(), strict=True):
            chunk = self.chunks[number]
            for sample in chunk.samples(index):
                yield WorkItem(chunk, index, sample)

    def release_prompts(self) -> None:
        for chunk in self.chunks:
            chunk.release_prompts()


def plan_buffer(chunks: Sequence[Chunk], order: str) -> Buffer:
    """Put the rows of `chunks` in order.

    "input": as they were read. "length": longest expected work of each chunk first. "prefix": rows
    that share a prefix of their prompts next to each other; over up to `MAX_MIXED_CHUNKS` chunks if
    that saves more than within each. "auto": "prefix" where it saves work, else "input".
    """
    sizes = [len(chunk.rows) for chunk in chunks]
    chunk_of = np.repeat(np.arange(len(chunks), dtype=np.int64), sizes)
    index_of = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
    is_requested = np.concatenate([chunk.is_requested() for chunk in chunks])
    num_tokens = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
    expected = np.concatenate([chunk.expected_tokens() for chunk in chunks])
    num_prompt_tokens = int(num_tokens[is_requested].sum())
    rows = np.flatnonzero(is_requested)
    shared = 0
    if order in ("prefix", "auto"):
        overall, within = prefix_trees(
            *_concatenated(chunks),
            is_requested,
            chunk_of // MAX_MIXED_CHUNKS,
            chunk_of,
            expected_tokens=expected,
        )
        threshold = MIN_SHARED * num_prompt_tokens
        if overall.num_shared_tokens - within.num_shared_tokens > threshold:
            rows, order = overall.depth_first(), "prefix over windows"
            shared = overall.num_shared_tokens
        elif order == "prefix" or within.num_shared_tokens > threshold:
            rows, order = within.depth_first(), "prefix in windows"
            shared = within.num_shared_tokens
        else:
            order = "input"
    if order == "length":
        longest_first = by_length(expected[rows])
        rows = rows[longest_first[np.argsort(chunk_of[rows[longest_first]], kind="stable")]]
    rows = rows[_by_adapter(chunks, rows)]
    return Buffer(chunks, chunk_of[rows], index_of[rows], order, num_prompt_tokens, shared)


def _by_adapter(
    chunks: Sequence[Chunk], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64] | slice:
    """Rows of one adapter next to each other, else as they are: an engine has room for few at once,
    and one that has to wait for room holds up nothing else then.
    """
    of_chunks = [chunk.adapters() for chunk in chunks]
    if not any(of_chunks):
        return slice(None)
    sizes = [len(chunk.rows) for chunk in chunks]
    named = [name for of, size in zip(of_chunks, sizes, strict=True) for name in of or [""] * size]
    _, numbers = np.unique(np.array(named), return_inverse=True)
    order: npt.NDArray[np.int64] = np.argsort(numbers[rows], kind="stable")
    return order


def _concatenated(
    chunks: Sequence[Chunk],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Token ids and offsets of all rows."""
    if len(chunks) == 1:
        return chunks[0].token_ids, chunks[0].offsets
    lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return np.concatenate([chunk.token_ids for chunk in chunks]), offsets
