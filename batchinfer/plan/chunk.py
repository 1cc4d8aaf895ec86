"""A chunk: rows of one window that were read and tokenized together.

Must not know: Parquet files, engines, checkpoints. Rows in `errors` and duplicates are results
without a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.errors import RowError
from batchinfer.plan.order import find_duplicates

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
    token_ids: npt.NDArray[np.int32]  # [offsets[-1]]; empty once all were requested
    offsets: npt.NDArray[np.int64]  # [n + 1]
    carried: pa.Table  # [n] the id and kept columns
    errors: dict[int, RowError]
    is_todo: npt.NDArray[np.bool_]  # [n, num_samples] what is not done yet
    deduplicate: bool = False
    counts: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # as in `Prepared`
    followers: dict[int, list[int]] = field(default_factory=dict)  # leader index -> its duplicates
    carried_bytes: int = field(init=False)  # of the carried columns and `is_todo`
    carried_row_bytes: int = field(init=False)  # mean

    def __post_init__(self) -> None:
        self.carried_bytes = self.carried.nbytes + self.is_todo.nbytes
        self.carried_row_bytes = self.carried_bytes // max(1, len(self.rows))
        if self.deduplicate:
            leader = find_duplicates(self.token_ids, self.offsets)
            for count in self.counts.values():
                leader[count != count[leader]] = -1
            for index in np.flatnonzero(leader >= 0).tolist():
                self.followers.setdefault(int(leader[index]), []).append(index)

    @classmethod
    def of_prompts(
        cls,
        prompts: Sequence[npt.NDArray[np.int32]],
        *,
        num_samples: int = 1,
        window: int = 0,
        first_row: int = 0,
    ) -> Chunk:
        """Prompts that no shard's rows stand behind: to be run, and not written."""
        num_rows = len(prompts)
        return cls(
            shard="",
            window=window,
            rows=np.arange(first_row, first_row + num_rows, dtype=np.int64),
            token_ids=np.concatenate(prompts),
            offsets=np.cumsum([0, *map(len, prompts)], dtype=np.int64),
            carried=pa.table({"id": pa.nulls(num_rows)}),
            errors={},
            is_todo=np.ones((num_rows, num_samples), dtype=np.bool_),
        )

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all rows."""
        return int(self.offsets[-1])

    def is_requested(self) -> npt.NDArray[np.bool_]:
        """Which rows need a request: not those in error, done, or computed with another. [n]"""
        is_requested: npt.NDArray[np.bool_] = np.array(self.is_todo.any(axis=1))
        is_requested[list(self.errors)] = False
        for followers in self.followers.values():
            is_requested[followers] = False
        return is_requested

    def samples(self, index: int) -> list[int]:
        """Samples not done yet of row `index`, one of `is_requested`."""
        if self.is_todo.shape[1] == 1:
            return [0]
        samples: list[int] = np.flatnonzero(self.is_todo[index]).tolist()
        return samples

    def prompt(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of row `index`. [num_prompt_tokens]"""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def num_prompt_tokens(self, index: int) -> int:
        return int(self.offsets[index + 1] - self.offsets[index])

    def release_prompts(self) -> None:
        """Forget the token ids: everything was requested, but results may be long in coming."""
        self.token_ids = np.empty(0, np.int32)


def request_seed(job_seed: int, shard: str, row: int, sample: int) -> int:
    """63-bit seed of one request, from its identity and not its position, so that a resume repeats
    it.
    """
    identity = f"{job_seed}\0{shard}\0{row}\0{sample}".encode()
    digest = hashlib.blake2b(identity, digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_MASK
