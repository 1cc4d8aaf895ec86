"""What a run may work on: pieces of the input that nobody else works on meanwhile.

Must not know: how a piece is read. A claim is of windows, or of some rows of one window, so that
one large shard can be given to several. A claim of all of a shard is finished by whoever has it; a
piece of one ends with its parts, and whoever gave it out finishes the shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.ledger import Totals
from batchinfer.runner.session import Session
from batchinfer.source import Shard


@dataclass(frozen=True, slots=True)
class Claim:
    """Windows of a shard, or of one window the rows [start, stop).

    `has_parts`, `is_finished`: whether there may be parts of the shard, or is a finished file; a
    claim without either has no result yet.
    """

    shard: Shard
    windows: range
    rows: tuple[int, int] | None = None
    is_whole: bool = False
    has_parts: bool = False
    is_finished: bool = False
    name: str = ""  # unique among those of a run; empty: the shard's

    @property
    def has_results(self) -> bool:
        return self.has_parts or self.is_finished


class ClaimWatcher(Protocol):
    """Told what becomes of claims, by their names, from several threads."""

    def started(self, claim: str) -> None:
        """The engine is about to get a row of it."""

    def read(self, claim: str, num_expected: int, num_done: int) -> None:
        """A window of it was read: the results it must have, and those durable already."""

    def stands(self, claim: str) -> bool:
        """Whether it still is ours. Asked before results of it are published."""

    def durable(self, claim: str, num_results: int) -> None:
        """So many more of its results are."""

    def ended(self, claim: str, num_expected: int, schema: pa.Schema) -> None:
        """All its results are durable, in parts: a piece of a shard."""

    def finished(self, claim: str, totals: Totals) -> None:
        """All its results are in the shard's finished file: a whole shard."""

    def failed(self, claim: str, error: InputError) -> None:
        """It cannot be read to its end, or its shard has changed."""


class Unwatched:
    """For a run that gives itself its claims."""

    def started(self, claim: str) -> None: ...

    def read(self, claim: str, num_expected: int, num_done: int) -> None: ...

    def stands(self, claim: str) -> bool:
        return True

    def durable(self, claim: str, num_results: int) -> None: ...

    def ended(self, claim: str, num_expected: int, schema: pa.Schema) -> None: ...

    def finished(self, claim: str, totals: Totals) -> None: ...

    def failed(self, claim: str, error: InputError) -> None: ...


def whole_shards(session: Session) -> Iterator[Claim]:
    """All of what is pending in this run's slice, a shard at a time."""
    listed = session.survey
    for shard in session.pending:
        yield Claim(
            shard,
            range(session.num_windows_of(shard)),
            is_whole=True,
            has_parts=shard.name in listed.with_parts,
            is_finished=shard.name in listed.finished,
        )
