"""Rows from places spread over the input, tokenized: what a plan knows without reading it all.

Must not know: what is done, engines. Memory: a number for each row; prompts only of the few that
are asked for.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from batchinfer.plan import OwnWay
from batchinfer.prompt import Prepared, RowPrompter
from batchinfer.source import RowFilter, Shard, ShardReader

#: Runs of neighbouring rows that a sample consists of: neighbours are what shares prefixes.
_NUM_PLACES = 32


@dataclass(frozen=True, slots=True)
class Expected:
    """What rows are likely to come to, by a sample of them."""

    num_batches: int
    prompt_tokens: float
    max_result_tokens: float | None  # None: only the rows decide


@dataclass(frozen=True, slots=True)
class Sample:
    """What was found. Rows that do not pass the filter are read, and neither prompt nor error."""

    num_read: int
    lengths: npt.NDArray[np.int64]  # [num_prompts] tokens
    num_errors: int
    num_duplicates: int  # of the prompts, those that another row read has too; 0 if none are kept
    prepare_s: float  # to render and tokenize them
    prompts: list[npt.NDArray[np.int32]]  # of as many as were asked for
    own: list[OwnWay] | None = None  # of each of them, where rows are computed in ways of their own

    def expected(self, num_rows: int, batch_rows: int, max_row_tokens: int | None) -> Expected:
        """What `num_rows` rows come to. `max_row_tokens`: most of the results of a row, if known.

        There is a prompt in the sample.
        """
        num_passing = num_rows * self.passing_share
        return Expected(
            num_batches=math.ceil(num_passing / batch_rows),
            prompt_tokens=float(self.lengths.mean()) * num_passing,
            max_result_tokens=None if max_row_tokens is None else max_row_tokens * num_passing,
        )

    def histogram(self, num_bins: int) -> list[tuple[int, int, int]]:
        """(prompts, least, most tokens) of each bin; no more bins than lengths."""
        num_bins = min(num_bins, max(1, int(np.ptp(self.lengths))))
        counts, edges = np.histogram(self.lengths, bins=num_bins)
        bins = zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
        return [(count, int(low), int(high)) for count, low, high in bins]

    @property
    def passing_share(self) -> float:
        """The share of the rows read that pass the filter."""
        return (len(self.lengths) + self.num_errors) / max(1, self.num_read)

    @property
    def prompt_share(self) -> float:
        """The share of the rows read that become a prompt."""
        return len(self.lengths) / max(1, self.num_read)


def read_sample(
    shards: Sequence[tuple[Shard, int]],
    prompter: RowPrompter,
    row_filter: RowFilter | None,
    *,
    max_rows: int,
    num_prompts: int = 0,
) -> Sample:
    """Read `max_rows` rows of shards, given with their numbers of rows; keep `num_prompts` of the
    prompts, and only then look which of them repeat.
    """
    lengths: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    prompts: list[npt.NDArray[np.int32]] = []
    own: list[OwnWay] = []
    num_read = num_errors = num_duplicates = 0
    seen: set[bytes] = set()
    prepare_s = 0.0
    num_kept_each = -(-num_prompts // _NUM_PLACES)
    for shard, ranges in _ranges(shards, max_rows):
        with ShardReader(shard, list(prompter.columns), row_filter) as reader:
            for start, stop in ranges:
                num_read += stop - start
                num_kept = 0
                for block in reader.blocks(start, stop):
                    begun_s = time.monotonic()
                    prepared = prompter.prepare(block.table)
                    prepare_s += time.monotonic() - begun_s
                    sizes = np.diff(prepared.offsets)
                    lengths.append(sizes[sizes > 0])
                    num_errors += len(prepared.errors)
                    digests = _digests(prepared) if num_prompts else []
                    num_duplicates += len(digests) - len(set(digests) - seen)
                    seen.update(digests)
                    for row in np.flatnonzero(sizes)[: num_kept_each - num_kept].tolist():
                        low, high = prepared.offsets[row : row + 2]
                        prompts.append(prepared.token_ids[low:high].copy())
                        if prepared.own is not None:
                            own.append(prepared.own[row])
                        num_kept += 1
    chosen = np.linspace(0, len(prompts) - 1, min(num_prompts, len(prompts))).astype(int)
    return Sample(
        num_read=num_read,
        lengths=np.concatenate(lengths),
        num_errors=num_errors,
        num_duplicates=num_duplicates,
        prepare_s=prepare_s,
        prompts=[prompts[i] for i in chosen],
        own=[own[i] for i in chosen] if own else None,
    )


def _digests(prepared: Prepared) -> list[bytes]:
    """A digest of each prompt."""
    edges = prepared.offsets.tolist()
    return [
        hashlib.blake2b(prepared.token_ids[low:high].tobytes(), digest_size=16).digest()
        for low, high in pairwise(edges)
        if low < high
    ]


def _ranges(
    shards: Sequence[tuple[Shard, int]], max_rows: int
) -> Iterator[tuple[Shard, list[tuple[int, int]]]]:
    """The ranges of rows to read in each shard, ascending."""
    edges = np.concatenate([[0], np.cumsum([num_rows for _, num_rows in shards])])
    total = int(edges[-1])
    size = -(-min(max_rows, total) // _NUM_PLACES)
    starts = np.arange(_NUM_PLACES) * total // _NUM_PLACES
    stops = np.minimum(starts + size, np.append(starts[1:], total))
    for (shard, num_rows), first_row in zip(shards, edges[:-1].tolist(), strict=True):
        low = np.clip(starts - first_row, 0, num_rows).tolist()
        high = np.clip(stops - first_row, 0, num_rows).tolist()
        ranges = [(start, stop) for start, stop in zip(low, high, strict=True) if start < stop]
        if ranges:
            yield shard, ranges
