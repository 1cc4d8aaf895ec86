"""What is left of the pending shards, as one member knows it. Pure.

A view that is old makes a request fail; it neither loses a row nor computes one again that is
durable (docs/architecture.md). Must not know: stores, who is gone. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from batchinfer.ledger.piece_leases import ShardLeases, Taken, name_of

#: Rows of a piece. Less would be many requests for small rows, more a long wait for the last piece
#: of a slow machine.
PIECE_ROWS = 512


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one window of a shard, or all of a small one."""

    shard: str
    rows: range
    is_whole: bool

    @property
    def name(self) -> str:
        return name_of(self.rows)


def pieces_of(shard: str, num_rows: int, window_rows: int) -> list[Piece]:
    """All rows of a shard, none twice."""
    if num_rows <= min(window_rows, PIECE_ROWS):
        return [Piece(shard, range(num_rows), is_whole=True)]
    return [
        Piece(shard, range(start, min(start + PIECE_ROWS, stop)), is_whole=False)
        for low in range(0, num_rows, window_rows)
        for stop in [min(low + window_rows, num_rows)]
        for start in range(low, stop, PIECE_ROWS)
    ]


@dataclass(slots=True)
class _ShardState:
    pieces: Sequence[Piece]
    leases: ShardLeases = field(default_factory=ShardLeases)
    had_leases: bool = False
    is_over: bool = False  # finished, or it cannot be read


class Board:
    """One for a run, used under a lock."""

    def __init__(self, num_rows: Mapping[str, int], window_rows: int, place: float) -> None:
        """`num_rows` of each pending shard, by name. `place`, in [0, 1): where among all pieces
        to begin. Members that begin at different places seldom ask for the same piece.
        """
        self._shards = {
            name: _ShardState(pieces_of(name, number, window_rows))
            for name, number in num_rows.items()
        }
        self._pieces = [piece for state in self._shards.values() for piece in state.pieces]
        self._next = int(place * len(self._pieces))
        self._num_left = len(self._pieces)  # not passed yet

    @property
    def is_over(self) -> bool:
        return all(state.is_over for state in self._shards.values())

    def num_rows_free(self, at_most: int) -> int:
        """Rows that nobody is known to have; counts no further than that."""
        num_rows = 0
        for index in range(self._next, self._next + self._num_left):
            piece = self._pieces[index % len(self._pieces)]
            num_rows += len(piece.rows) if self._is_fresh(piece) else 0
            if num_rows >= at_most:
                break
        return num_rows

    def next_fresh(self) -> Piece | None:
        """A piece that nobody is known to have. The same again until it is `passed`."""
        while self._num_left:
            piece = self._pieces[self._next]
            if self._is_fresh(piece):
                return piece
            self.passed()
        return None

    def passed(self) -> None:
        """Somebody has it: we, or another."""
        self._next = (self._next + 1) % len(self._pieces)
        self._num_left -= 1

    def _is_fresh(self, piece: Piece) -> bool:
        state = self._shards[piece.shard]
        leases, name = state.leases, piece.name
        return not (state.is_over or name in leases.taken or name in leases.ended)

    def see(self, shard: str, leases: ShardLeases) -> bool:
        """What a listing shows. False: the shard had leases and has none any more, so it has been
        finished, or somebody has deleted them.
        """
        state = self._shards.get(shard)
        if state is None or state.is_over:
            return True
        has_leases = bool(leases.taken or leases.ended)
        had_leases, state.had_leases = state.had_leases, has_leases
        state.leases = leases
        return has_leases or not had_leases

    def touched(self, shard: str) -> None:
        """It has leases now, whatever a listing is going to show."""
        self._shards[shard].had_leases = True

    def begin_again(self) -> None:
        """Leases were deleted of a shard that is not finished."""
        self._num_left = len(self._pieces)

    def close(self, shard: str) -> None:
        """It is finished, or it cannot be read."""
        self._shards[shard].is_over = True

    def open_shards(self) -> list[str]:
        return [name for name, state in self._shards.items() if not state.is_over]

    def held(self) -> Iterator[tuple[Piece, Taken]]:
        """Pieces that somebody had when last seen, and had not brought to their end."""
        for state in self._shards.values():
            for piece in () if state.is_over else state.pieces:
                taken = state.leases.taken.get(piece.name)
                if taken is not None and piece.name not in state.leases.ended:
                    yield piece, taken

    def leases_of(self, shard: str) -> ShardLeases:
        return self._shards[shard].leases

    def ended(self, shard: str) -> list[tuple[Piece, int]] | None:
        """Each piece with the results that are due; None: not all have ended, or one is all."""
        state = self._shards[shard]
        known = state.leases.ended
        if state.is_over or state.pieces[0].is_whole:
            return None
        if any(piece.name not in known for piece in state.pieces):
            return None
        return [(piece, known[piece.name]) for piece in state.pieces]
