"""What other members have done, for the progress of a member. Must not know: stores, leases."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from batchinfer.runner.joined.board import Piece
from batchinfer.telemetry import Counters


@dataclass(slots=True)
class _Counted:
    num_rows: int = 0
    num_expected: int = 0
    is_finished: bool = False
    pieces: set[str] = field(default_factory=set)


class Seen:
    """Rows that others have done count as done; no row is counted twice."""

    def __init__(self, num_rows: Mapping[str, int], num_samples: int, counters: Counters) -> None:
        """`num_rows` of each shard, by name."""
        self._num_rows = num_rows
        self._num_samples = num_samples
        self._counters = counters
        self._shards = {name: _Counted() for name in num_rows}
        self._lock = threading.Lock()

    def counted(self, piece: Piece, num_expected: int) -> None:
        """A piece that this member reads, which counts it."""
        with self._lock:
            self._add(piece.shard, piece.name, len(piece.rows), num_expected)

    def see(self, shard: str, ended: Mapping[str, int]) -> None:
        """Pieces that have ended, by name with their results."""
        with self._lock:
            for name, num_expected in ended.items():
                start, stop = map(int, name.split("-"))
                if self._add(shard, name, stop - start, num_expected):
                    self._count(stop - start, num_expected)

    def finished(self, shard: str, num_results: int) -> bool:
        """A shard that another member has finished. Whether that is news."""
        with self._lock:
            counted = self._shards[shard]
            is_news, counted.is_finished = not counted.is_finished, True
            left = self._num_rows[shard] - counted.num_rows
            if left > 0:
                self._count(left, max(0, num_results - counted.num_expected))
                counted.num_rows = self._num_rows[shard]
            return is_news

    def _add(self, shard: str, name: str, num_rows: int, num_expected: int) -> bool:
        counted = self._shards.get(shard)
        if counted is None or name in counted.pieces:
            return False
        counted.pieces.add(name)
        counted.num_rows += num_rows
        counted.num_expected += num_expected
        return True

    def _count(self, num_rows: int, num_expected: int) -> None:
        self._counters.add_read(num_rows * self._num_samples, num_expected, num_expected)
