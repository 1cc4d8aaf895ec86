"""What one member of a joined run knows of what is left."""

from __future__ import annotations

import pytest

from batchinfer.ledger.piece_leases import ShardLeases, Taken
from batchinfer.runner.joined.board import PIECE_ROWS, Board, pieces_of


@pytest.mark.parametrize("num_rows", [0, 1, 511, 512, 513, 1000, 5000])
@pytest.mark.parametrize("window_rows", [1, 64, 500, 512, 600, 16384])
def test_pieces_have_each_row_once_and_never_rows_of_two_windows(
    num_rows: int, window_rows: int
) -> None:
    pieces = pieces_of("s", num_rows, window_rows)
    assert [row for piece in pieces for row in piece.rows] == list(range(num_rows))
    for piece in pieces:
        assert len(piece.rows) <= PIECE_ROWS
        assert len({row // window_rows for row in piece.rows}) <= 1
        assert piece.is_whole == (len(pieces) == 1)
    assert len({piece.name for piece in pieces}) == len(pieces)


def test_members_begin_at_different_places_and_each_comes_to_every_piece() -> None:
    firsts = set()
    for place in (0.0, 0.3, 0.999):
        board = Board({"a": 2000, "b": 10, "c": 0}, 500, place)
        names = []
        while (piece := board.next_fresh()) is not None:
            names.append((piece.shard, piece.name))
            board.passed()
        assert len(names) == len(set(names)) == 6
        firsts.add(names[0])
    assert len(firsts) == 3


def test_a_shard_whose_leases_are_gone_is_looked_at_even_if_no_listing_had_them() -> None:
    """Taken by us, ended and finished by others, all between two listings."""
    board = Board({"a": 2000}, 500, 0.0)
    assert board.see("a", ShardLeases())
    board.touched("a")
    assert not board.see("a", ShardLeases())
    assert board.see("a", ShardLeases()), "said once"
    board.close("a")
    assert board.is_over


def test_a_shard_can_be_folded_once_each_piece_has_ended() -> None:
    board = Board({"a": 1000}, 500, 0.0)
    names = [piece.name for piece in pieces_of("a", 1000, 500)]
    board.see("a", ShardLeases({names[0]: Taken(2, "v")}, {names[1]: 499}))
    assert board.ended("a") is None
    assert [(piece.name, taken.number) for piece, taken in board.held()] == [(names[0], 2)]
    board.see("a", ShardLeases({names[0]: Taken(2, "v")}, {names[0]: 500, names[1]: 499}))
    assert [number for _, number in board.ended("a") or ()] == [500, 499]
    assert list(board.held()) == []
