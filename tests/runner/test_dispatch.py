"""Who gets which rows: each row once, whoever dies, and all replicas end together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.runner.replicas.dispatch import Dispatch, ShardPiece

WINDOW = 100


def finish(dispatch: Dispatch, replica: int, piece: ShardPiece, num_samples: int = 1) -> None:
    dispatch.started(replica, piece.name)
    dispatch.read(replica, piece.name, piece.num_rows * num_samples, 0)
    dispatch.durable(replica, piece.name, piece.num_rows * num_samples)
    dispatch.done(replica, piece.name)


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 350), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(0, 1 << 30),
)
def test_every_row_is_in_exactly_one_piece_that_ended_whoever_died(
    num_rows: Sequence[int], num_replicas: int, seed: int
) -> None:
    moments = random.Random(seed)
    dispatch = Dispatch(num_rows, WINDOW, 1)
    for replica in range(num_replicas):
        dispatch.begin(replica)
    held: dict[int, list[ShardPiece]] = {replica: [] for replica in range(num_replicas)}
    ended: list[ShardPiece] = []
    num_computed: Counter[int] = Counter()
    for _ in range(5000):
        if dispatch.is_over:
            break
        replica = moments.randrange(num_replicas)
        event = moments.random()
        if event < 0.5:
            if (piece := dispatch.take(replica)) is not None:
                held[replica].append(piece)
        elif event < 0.95 and held[replica]:
            piece = held[replica].pop(0)
            finish(dispatch, replica, piece)
            num_computed[replica] += piece.num_rows
            dispatch.computed(replica, num_computed[replica])
            ended.append(piece)
        elif event >= 0.95:
            assert dispatch.lost(replica) == [], "nothing was in an engine"
            held[replica], num_computed[replica] = [], 0
            dispatch.begin(replica)
    assert dispatch.is_over
    rows = Counter((p.shard, row) for p in ended for row in range(p.start, p.stop))
    assert set(rows.values()) <= {1}
    assert len(rows) == sum(num_rows)
    assert {p.shard for p in ended} == set(range(len(num_rows))), "those without rows too"
    for piece in ended:
        if piece.num_rows:
            assert piece.start // WINDOW == (piece.stop - 1) // WINDOW == piece.window


@pytest.mark.parametrize("speeds", [(1, 1), (1, 1, 1, 1), (3, 1), (1, 1, 1, 9)])
@pytest.mark.parametrize("num_rows", [(4000,), (3000, *[50] * 20), (150,)])
def test_replicas_of_any_speed_end_within_one_windows_time(
    speeds: Sequence[int], num_rows: Sequence[int]
) -> None:
    dispatch = Dispatch(num_rows, WINDOW, 1)
    capacity = 16
    for replica in range(len(speeds)):
        dispatch.begin(replica)
        dispatch.ready(replica, capacity)
    queues: list[list[ShardPiece]] = [[] for _ in speeds]
    done_of = [0] * len(speeds)  # rows of the first piece
    computed = [0] * len(speeds)
    idle_since: dict[int, int] = {}
    for now in range(100_000):
        for replica, speed in enumerate(speeds):
            while (piece := dispatch.take(replica)) is not None:
                queues[replica].append(piece)
            if queues[replica]:
                idle_since.pop(replica, None)
            else:
                idle_since.setdefault(replica, now)
            for _ in range(speed):
                if not queues[replica]:
                    break
                computed[replica] += 1
                done_of[replica] += 1
                if done_of[replica] == queues[replica][0].num_rows:
                    finish(dispatch, replica, queues[replica].pop(0))
                    done_of[replica] = 0
            dispatch.computed(replica, computed[replica])
        if dispatch.is_over:
            break
    assert sum(computed) == sum(num_rows)
    longest_idle = max((now - since for since in idle_since.values()), default=0)
    assert longest_idle <= WINDOW / min(speeds)
    perfect = sum(num_rows) / sum(speeds)
    assert now <= perfect + WINDOW / min(speeds)


def test_a_replica_that_is_not_up_yet_holds_little() -> None:
    dispatch = Dispatch([10_000], 1000, 1)
    dispatch.begin(0)
    dispatch.begin(1)
    dispatch.ready(0, 64)
    taken = Counter[int]()
    for _ in range(100):
        for replica in range(2):
            if (piece := dispatch.take(replica)) is not None:
                taken[replica] += piece.num_rows
    assert taken[1] <= 200 < taken[0]


def test_the_largest_shard_is_begun_first() -> None:
    dispatch = Dispatch([10, 500, 90], WINDOW, 1)
    dispatch.begin(0)
    order = []
    while (piece := dispatch.take(0)) is not None:
        order.append(piece.shard)
        finish(dispatch, 0, piece)
        dispatch.computed(0, sum([10, 500, 90][s] for s in set(order)))
    assert list(dict.fromkeys(order)) == [1, 2, 0]


def test_what_was_in_the_engine_at_two_deaths_is_left_out_and_nothing_else() -> None:
    dispatch = Dispatch([100, 100, 100], WINDOW, 1)
    dispatch.begin(0)
    dispatch.ready(0, 1000)
    first, second, third = (dispatch.take(0) for _ in range(3))
    assert first and second and third
    for piece in (first, second):  # the third is read and waits
        dispatch.started(0, piece.name)
    assert dispatch.lost(0) == []
    dispatch.begin(0)
    dispatch.ready(0, 1000)
    again = [piece for _ in range(3) if (piece := dispatch.take(0)) is not None]
    assert again == [first, third], "of suspects one at a time"
    dispatch.started(0, first.name)
    dispatch.started(0, third.name)
    assert dispatch.lost(0) == [first]
    dispatch.begin(0)
    dispatch.ready(0, 1000)
    while (piece := dispatch.take(0)) is not None:
        finish(dispatch, 0, piece)
    assert dispatch.is_over
    assert dispatch.deadly == [first]


def test_progress_between_deaths_takes_the_suspicion_away_but_not_for_ever() -> None:
    dispatch = Dispatch([100], WINDOW, 1)
    for death in range(1, 5):
        dispatch.begin(0)
        piece = dispatch.take(0)
        assert piece is not None
        dispatch.started(0, piece.name)
        dispatch.read(0, piece.name, 100, death)
        dispatch.durable(0, piece.name, 1)
        assert dispatch.lost(0) == ([piece] if death == 4 else [])
