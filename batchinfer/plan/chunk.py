"""A chunk: rows of one window that were read and tokenized together.

Must not know: Parquet files, engines, checkpoints. Rows in `errors` and duplicates are results
without a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.errors import RowError
from batchinfer.plan.order import find_duplicates

_SEED_MASK = (1 << 63) - 1
#: About what takes in memory what rows may share of `OwnWay`.
_SHARED_BYTES = 2048


class OwnWay(Protocol):
    """How one row is computed, where rows differ in that: what a plan needs of it."""

    @property
    def shared(self) -> object:
        """The same object for rows that are computed alike but for adapter and seed."""

    @property
    def is_repeatable(self) -> bool:
        """Whether equal prompts that are computed alike have equal results."""

    @property
    def max_tokens(self) -> int:
        """Of the longest completion."""

    @property
    def lora(self) -> str | None:
        """The name of the row's adapter; None: the job's, if there is one."""


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
    own: npt.NDArray[np.object_] | None = None  # [n] see `Prepared`
    claim: str = ""  # by whose name its results are collected; empty: the shard's
    followers: dict[int, list[int]] = field(default_factory=dict)  # leader index -> its duplicates
    carried_bytes: int = field(init=False)  # of the carried columns, `is_todo` and `own`
    carried_row_bytes: int = field(init=False)  # mean

    def __post_init__(self) -> None:
        self.carried_bytes = self.carried.nbytes + self.is_todo.nbytes + own_bytes(self.own)
        self.carried_row_bytes = self.carried_bytes // max(1, len(self.rows))
        if self.deduplicate:
            leader = find_duplicates(self.token_ids, self.offsets, _repeatable_ways(self.own))
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
        own: Sequence[OwnWay] | None = None,
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
            own=None if own is None else object_array(own),
        )

    @property
    def claim_name(self) -> str:
        return self.claim or self.shard

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

    def own_of(self, index: int) -> OwnWay | None:
        """How row `index` is computed, where rows have their own way."""
        return None if self.own is None else self.own[index]

    def expected_tokens(self) -> npt.NDArray[np.int64]:
        """What each row may take: its prompt, and its own longest completion where rows differ in
        that. [n]
        """
        num_tokens: npt.NDArray[np.int64] = np.diff(self.offsets)
        if self.own is None:
            return num_tokens
        own = [0 if own is None else own.max_tokens for own in self.own]
        return num_tokens + np.array(own, np.int64)

    def adapters(self) -> list[str]:
        """The name of each row's adapter, "" for the job's own; none where no row has one. [n]"""
        if self.own is None or not any(one is not None and one.lora for one in self.own):
            return []
        return ["" if one is None or one.lora is None else one.lora for one in self.own]

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


def own_seed(seed: int, sample: int) -> int:
    """63-bit seed of one request of a row that brings its own: wherever the row stands, the same
    again.
    """
    return (seed + sample) & _SEED_MASK


def object_array(values: Sequence[object]) -> npt.NDArray[np.object_]:
    """As they are: numpy would look into sequences. [n]"""
    array = np.empty(len(values), np.object_)
    for index, value in enumerate(values):
        array[index] = value
    return array


def own_bytes(own: npt.NDArray[np.object_] | None) -> int:
    """About what `Prepared.own` takes in memory."""
    if own is None:
        return 0
    ways = {id(one.shared) for one in own if one is not None}
    return int(own.nbytes) + _SHARED_BYTES * len(ways)


def _repeatable_ways(own: npt.NDArray[np.object_] | None) -> list[Hashable] | None:
    """For each row how it is computed, if that is repeatable, else None: equal prompts have equal
    results only if they are computed alike.
    """
    if own is None:
        return None
    return [
        (id(one.shared), one.lora) if one is not None and one.is_repeatable else None for one in own
    ]
