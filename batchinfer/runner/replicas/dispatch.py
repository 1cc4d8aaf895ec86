"""Which rows a replica gets when it asks, and what becomes of them when it dies. Pure.

Largest shards first, a window at a time while much is left. A replica may hold a window's rows, or
twice what its engine runs at once, but never more than its fair share of what is not done; so the
last windows are split, and all replicas end within a window's time, however fast each is. Must not
know: processes, storage, rows' content. Invariant: every row of every shard is in exactly one
piece, and a piece is with one replica, waiting, done, or given up as what kills replicas.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: In rows: of a replica whose engine is not up yet, so nothing is known of it.
UNKNOWN_CAPACITY = 128
#: Deaths with a piece in the engine: after so many without a durable result of it in between, or
#: after so many in all, it is taken for what kills.
_MAX_DEATHS_WITHOUT_RESULT = 2
_MAX_DEATHS = 4


@dataclass(slots=True, eq=False)
class ShardPiece:
    """Rows [start, stop) of one window, or all of a shard of at most one window."""

    name: str
    shard: int  # its index
    window: int
    start: int
    stop: int
    is_whole: bool
    is_started: bool = False  # the engine has got rows of it, in the hands of who has it now
    was_lost: bool = False  # with a replica that died
    num_deaths: int = 0
    num_deaths_without_result: int = 0
    num_expected: int | None = None  # results; None: not read yet
    num_known: int = 0  # of them durable, as far as we were told

    @property
    def is_suspect(self) -> bool:
        """It was in the engine of a replica that died, and nothing of it is durable since."""
        return self.num_deaths_without_result > 0

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class Holding:
    """What a replica has. Counts are of results."""

    pieces: dict[str, ShardPiece] = field(default_factory=dict)
    capacity: int | None = None  # of its engine, in flight; None: it is not up
    num_given: int = 0  # to compute, as far as known
    num_computed: int = 0

    @property
    def num_open(self) -> int:
        return max(0, self.num_given - self.num_computed)


class Dispatch:
    """One for a run, used by one thread."""

    def __init__(
        self,
        num_rows: Sequence[int],
        window_rows: int,
        num_samples: int,
        *,
        is_fed: bool = False,
    ) -> None:
        """`num_rows` of each shard, before the filter. `is_fed`: what is added alone is given."""
        self._num_rows = num_rows
        self._window_rows = window_rows
        self._num_samples = num_samples
        order = sorted(range(len(num_rows)), key=lambda index: -num_rows[index])
        self._fresh = self._windows(() if is_fed else order)
        self._added: deque[tuple[int, int, int]] = deque()
        self._next: tuple[int, int, int] | None = next(self._fresh, None)  # shard, start, stop
        self._num_fresh = 0 if is_fed else sum(num_rows)
        self.num_rows_outside = 0.0  # that may be added: a fair share is of those, too
        self._again: deque[ShardPiece] = deque()
        self._holdings: dict[int, Holding] = {}
        self._num_named = 0
        self._given_up: set[int] = set()  # shards
        self.deadly: list[ShardPiece] = []

    def _windows(self, shards: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        for shard in shards:
            num_rows = self._num_rows[shard]
            for start in range(0, max(1, num_rows), self._window_rows):
                yield shard, start, min(start + self._window_rows, num_rows)

    def add(self, shard: int, start: int, stop: int) -> None:
        """Rows of one window of a shard, after all others."""
        self._added.append((shard, start, stop))
        self._num_fresh += stop - start
        if self._next is None:
            self._next = self._following()

    def _following(self) -> tuple[int, int, int] | None:
        found = next(self._fresh, None)
        return self._added.popleft() if found is None and self._added else found

    def has_room(self, replica: int) -> bool:
        """Whether a replica may have more, as far as there is more."""
        return self._allowed(self._holdings[replica]) > 0

    def begin(self, replica: int) -> None:
        """A replica starts, with nothing."""
        self._holdings[replica] = Holding()

    def ready(self, replica: int, capacity: int) -> None:
        """Its engine is up: so many requests may be in flight there."""
        self._holdings[replica].capacity = capacity

    def computed(self, replica: int, num_results: int) -> None:
        """How many results it has computed by now."""
        self._holdings[replica].num_computed = num_results

    @property
    def is_over(self) -> bool:
        """Everything is done, or given up."""
        return not self.has_waiting and not any(h.pieces for h in self._holdings.values())

    @property
    def has_waiting(self) -> bool:
        return bool(self._again) or self._next is not None

    def take(self, replica: int) -> ShardPiece | None:
        """Something for a replica that asks; None: nothing for it now."""
        holding = self._holdings[replica]
        num_rows = self._allowed(holding)
        if not num_rows:
            return None
        piece = self._lost_before(holding)
        if piece is None:
            if self._next is None:
                return None
            piece = self._cut(num_rows)
        piece.is_started = False
        holding.pieces[piece.name] = piece
        holding.num_given += self._left_of(piece)
        return piece

    def _lost_before(self, holding: Holding) -> ShardPiece | None:
        """The first that goes back to work. Of suspects a replica has one at a time: if it dies
        again, that one is to blame.
        """
        has_suspect = any(piece.is_suspect for piece in holding.pieces.values())
        for piece in self._again:
            if not (has_suspect and piece.is_suspect):
                self._again.remove(piece)
                return piece
        return None

    def _left_of(self, piece: ShardPiece) -> int:
        """Results that are still to be computed, as far as known."""
        if piece.num_expected is None:
            return piece.num_rows * self._num_samples
        return piece.num_expected - piece.num_known

    def _allowed(self, holding: Holding) -> int:
        """How many rows it may have more; 0: it has to wait until more is done."""
        num_fresh = self._num_fresh + self.num_rows_outside
        num_left = num_fresh * self._num_samples + sum(map(self._left_of, self._again))
        num_left += sum(h.num_open for h in self._holdings.values())
        fair = num_left / len(self._holdings)
        capacity = (
            UNKNOWN_CAPACITY * self._num_samples if holding.capacity is None else holding.capacity
        )
        most: float = capacity
        if holding.capacity is not None:
            window = self._window_rows * self._num_samples
            most = max(2 * capacity, min(fair / 2, window))
        allowed = min(fair, most) - holding.num_open
        if holding.num_open and allowed < min(fair / 8, capacity / 8):
            return 0  # a little later it is more at once
        return max(0 if holding.num_open else 1, math.ceil(allowed / self._num_samples))

    def _cut(self, num_rows: int) -> ShardPiece:
        assert self._next is not None
        shard, start, stop = self._next
        end = min(stop, start + num_rows)
        is_whole = (start, end) == (0, self._num_rows[shard])
        self._next = (shard, end, stop) if end < stop else self._following()
        self._num_fresh -= end - start
        while self._next is not None and self._next[0] in self._given_up:
            self._num_fresh -= self._next[2] - self._next[1]
            self._next = self._following()
        self._num_named += 1
        return ShardPiece(
            name=f"{self._num_named}",
            shard=shard,
            window=start // self._window_rows,
            start=start,
            stop=end,
            is_whole=is_whole,
        )

    def started(self, replica: int, name: str) -> None:
        """The engine there is about to get rows of it."""
        self._holdings[replica].pieces[name].is_started = True

    def read(self, replica: int, name: str, num_expected: int, num_done: int) -> int:
        """It was read: how many of its durable results nobody had told us of yet."""
        holding = self._holdings[replica]
        piece = holding.pieces[name]
        holding.num_given += num_expected - num_done - self._left_of(piece)
        num_new = num_done - piece.num_known
        piece.num_expected, piece.num_known = num_expected, num_done
        return num_new

    def durable(self, replica: int, name: str, num_results: int) -> None:
        """So many more of its results are."""
        piece = self._holdings[replica].pieces[name]
        piece.num_known += num_results
        piece.num_deaths_without_result = 0

    def done(self, replica: int, name: str) -> ShardPiece:
        """Nothing of it is left to do."""
        return self._holdings[replica].pieces.pop(name)

    def piece(self, replica: int, name: str) -> ShardPiece:
        return self._holdings[replica].pieces[name]

    def holds(self, replica: int, name: str) -> bool:
        return replica in self._holdings and name in self._holdings[replica].pieces

    def give_up(self, shard: int) -> None:
        """Nothing more of a shard is computed: it cannot be read."""
        self._given_up.add(shard)
        self._again = deque(piece for piece in self._again if piece.shard != shard)
        while self._next is not None and self._next[0] in self._given_up:
            self._num_fresh -= self._next[2] - self._next[1]
            self._next = self._following()

    def lost(self, replica: int) -> list[ShardPiece]:
        """A replica died: what it had goes back to the head of the queue. The pieces among them
        that are taken for what killed it do not: they are returned.
        """
        holding = self._holdings.pop(replica, Holding())
        back: list[ShardPiece] = []
        deadly: list[ShardPiece] = []
        for piece in holding.pieces.values():
            piece.was_lost = True
            if piece.is_started:
                piece.num_deaths += 1
                piece.num_deaths_without_result += 1
            is_deadly = piece.is_started and (
                piece.num_deaths_without_result >= _MAX_DEATHS_WITHOUT_RESULT
                or piece.num_deaths >= _MAX_DEATHS
            )
            if piece.shard not in self._given_up:
                (deadly if is_deadly else back).append(piece)
        self._again.extendleft(reversed(back))
        self.deadly += deadly
        return deadly
