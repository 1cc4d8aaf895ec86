"""A chunk: rows of one window that were read, tokenized and ordered together, ready for admission.

Must not know: Parquet files, engines, checkpoints. Invariant: `work()` yields each (row, sample)
that is still to be computed exactly once; rows in `errors` and duplicates are results without a
request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.errors import RowError
from batchinfer.plan.order import find_duplicates, order_rows

_SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """One request to be: row `index` of `chunk`, sample `sample`."""

    chunk: Chunk
    index: int
    sample: int


@dataclass(slots=True, eq=False)
class Chunk:
    """n rows of one window of one shard.

    Token ids are flat: row i has [offsets[i], offsets[i + 1]).
    """

    shard: str
    window: int
    rows: npt.NDArray[np.int64]  # [n] row numbers in the shard
    token_ids: npt.NDArray[np.int32]  # [offsets[-1]]
    offsets: npt.NDArray[np.int64]  # [n + 1]
    carried: pa.Table  # [n] the id and kept columns
    errors: dict[int, RowError]
    is_todo: npt.NDArray[np.bool_]  # [n, num_samples] what is not done yet
    order: str = "length"
    deduplicate: bool = False
    followers: dict[int, list[int]] = field(default_factory=dict)  # leader index -> its duplicates
    size_bytes: int = field(init=False)  # of the token ids and carried columns
    carried_row_bytes: int = field(init=False)  # mean

    def __post_init__(self) -> None:
        carried_bytes = self.carried.nbytes
        self.size_bytes = self.token_ids.nbytes + carried_bytes
        self.carried_row_bytes = carried_bytes // max(1, len(self.rows))

    def work(self) -> Iterator[WorkItem]:
        """What to request, in order of admission; a row's samples are neighbours (same prefix)."""
        is_follower = np.zeros(len(self.rows), dtype=np.bool_)
        if self.deduplicate:
            leader = find_duplicates(self.token_ids, self.offsets)
            is_follower = leader >= 0
            for index in np.flatnonzero(is_follower).tolist():
                self.followers.setdefault(int(leader[index]), []).append(index)
        samples = [np.flatnonzero(todo).tolist() for todo in self.is_todo]
        for index in order_rows(np.diff(self.offsets), self.order).tolist():
            if is_follower[index] or index in self.errors:
                continue
            for sample in samples[index]:
                yield WorkItem(self, index, sample)

    def prompt(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of row `index`. [num_prompt_tokens]"""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def num_prompt_tokens(self, index: int) -> int:
        return int(self.offsets[index + 1] - self.offsets[index])


def seed_of(job_seed: int, shard: str, row: int, sample: int) -> int:
    """63-bit seed of one request, from its identity and not its position, so that a resume repeats
    it.
    """
    identity = f"{job_seed}\0{shard}\0{row}\0{sample}".encode()
    digest = hashlib.blake2b(identity, digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_MASK
