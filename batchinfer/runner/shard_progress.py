"""How far a shard, or a piece of one, has come that is being computed.

Pure: nothing is written, nobody is asked. Must not know: threads, storage. Invariant (rule 1 of
docs/architecture.md): a shard is complete only when all of its windows were read and every result
that they must have is in. Of a piece the parts are all that is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa

from batchinfer.runner.claims import Claim
from batchinfer.runner.session import Session
from batchinfer.tasks import Result


@dataclass(slots=True, eq=False)
class ShardProgress:
    """Results are buffered by window until they are taken for a part or for the finished file."""

    name: str
    schema: pa.Schema
    num_windows: int  # of the claim
    recheck: Callable[[], None]  # raises InputError if the shard changed since it was listed
    has_results: bool  # a finished file or parts: results that are not in our hands
    claim: str = ""  # its name; empty: the shard's
    is_piece: bool = False
    buffers: dict[int, list[Result]] = field(default_factory=dict)  # by window
    num_expected: dict[int, int] = field(default_factory=dict)  # by window that was read
    num_done: int = 0
    num_publishing: int = 0
    is_finishing: bool = False

    @property
    def claim_name(self) -> str:
        return self.claim or self.name

    @property
    def is_complete(self) -> bool:
        is_read = len(self.num_expected) == self.num_windows
        return is_read and self.num_done == sum(self.num_expected.values())

    @property
    def expected_by_window(self) -> list[int]:
        return [self.num_expected.get(window, 0) for window in range(self.num_windows)]

    def add(self, result: Result) -> None:
        self.buffers.setdefault(result.chunk.window, []).append(result)
        self.num_done += 1

    def window_read(self, window: int, num_expected: int, num_done: int) -> None:
        """How many results the window must have, and how many are durable already."""
        self.num_expected[window] = num_expected
        self.num_done += num_done

    def begin_part(self) -> None:
        """From now on not all of its results are in our hands."""
        self.has_results = True

    def begin_publishing(self) -> None:
        self.num_publishing += 1

    def end_publishing(self) -> None:
        self.num_publishing -= 1

    def begin_finishing(self) -> None:
        """Its finished file is the last that is written of it."""
        self.is_finishing = True

    def take(self) -> dict[int, list[Result]]:
        """What is buffered, by window. The buffers are empty then."""
        taken, self.buffers = self.buffers, {}
        return taken


def progress_of(session: Session, claim: Claim, schema: pa.Schema) -> ShardProgress:
    """A claim of which this run has no result yet."""
    shard = claim.shard
    return ShardProgress(
        name=shard.name,
        schema=schema,
        num_windows=len(claim.windows),
        recheck=partial(session.recheck, shard),
        has_results=claim.has_results,
        claim=claim.name,
        is_piece=not claim.is_whole,
    )
