"""What a run may work on: pieces of the input that nobody else works on meanwhile.

Must not know: how a piece is read. A claim is of windows, so that one large shard can be given to
several; whoever has finished its last window, in this run or another, finishes the shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchinfer.runner.session import Session
from batchinfer.source import Shard


@dataclass(frozen=True, slots=True)
class Claim:
    """Windows of a shard."""

    shard: Shard
    windows: range


def whole_shards(session: Session) -> Iterator[Claim]:
    """All of what is pending in this run's slice, a shard at a time."""
    for shard in session.pending:
        yield Claim(shard, range(session.num_windows_of(shard)))
