"""Between reader and engine: work comes out once and in order, and the reader alone waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import groupby

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import RowError
from batchinfer.plan import Buffer, Chunk, plan_buffer
from batchinfer.runner import ready as ready_module
from batchinfer.runner.ready import ReadyWork

NO_LIMIT = 1 << 40


def chunk_of(
    first_row: int,
    num_rows: int,
    *,
    num_samples: int = 1,
    failed: tuple[int, ...] = (),
    row_tokens: int = 1,
) -> Chunk:
    return Chunk(
        shard="a.parquet",
        window=0,
        rows=np.arange(first_row, first_row + num_rows, dtype=np.int64),
        token_ids=np.arange(num_rows * row_tokens, dtype=np.int32) + first_row,
        offsets=np.arange(num_rows + 1, dtype=np.int64) * row_tokens,
        carried=pa.table({"id": pa.array(range(num_rows), pa.int64())}),
        errors={index: RowError("empty_prompt", "no tokens") for index in failed},
        is_todo=np.ones((num_rows, num_samples), dtype=np.bool_),
    )


def ready_of(
    *, order: str = "input", max_tokens: int = NO_LIMIT, max_carried_bytes: int = NO_LIMIT
) -> ReadyWork:
    return ReadyWork(order=order, max_tokens=max_tokens, max_carried_bytes=max_carried_bytes)


class Feeder:
    """Puts chunks from a thread of its own, as the reader does."""

    def __init__(self, ready: ReadyWork, chunks: list[Chunk], *, closes: bool = True) -> None:
        self.num_put = 0
        self.answers: list[bool] = []
        self._ready, self._chunks, self._closes = ready, chunks, closes
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        for chunk in self._chunks:
            self.answers.append(self._ready.put(chunk))
            self.num_put += 1
        if self._closes:
            self._ready.close()

    def join(self) -> None:
        self._thread.join(5)
        assert not self._thread.is_alive()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return condition()


def taken_until_exhausted(ready: ReadyWork) -> list[tuple[int, int]]:
    taken = []
    while not ready.is_exhausted:
        ready.wait(1)
        while (item := ready.take()) is not None:
            assert len(item.chunk.prompt(item.index))  # not released before it was requested
            taken.append((int(item.chunk.rows[item.index]), item.sample))
    return taken


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), max_size=8),
    num_samples=st.integers(1, 3),
    order=st.sampled_from(["input", "length", "prefix", "auto"]),
    max_tokens=st.sampled_from([1, 5, 12, NO_LIMIT]),
    max_carried_bytes=st.sampled_from([1, 30, NO_LIMIT]),
    num_feeders=st.integers(1, 3),
    data=st.data(),
)
def test_everything_comes_out_once_and_a_single_reader_s_input_in_order(
    sizes: list[int],
    num_samples: int,
    order: str,
    max_tokens: int,
    max_carried_bytes: int,
    num_feeders: int,
    data: st.DataObject,
) -> None:
    chunks, expected = [], []
    for number, size in enumerate(sizes):
        failed = data.draw(st.sets(st.integers(0, size - 1)))
        first = number * 100
        chunks.append(chunk_of(first, size, num_samples=num_samples, failed=tuple(failed)))
        expected += [
            (first + i, s) for i in range(size) if i not in failed for s in range(num_samples)
        ]
    ready = ready_of(order=order, max_tokens=max_tokens, max_carried_bytes=max_carried_bytes)
    feeders = [Feeder(ready, chunks[n::num_feeders], closes=False) for n in range(num_feeders)]
    threading.Thread(target=lambda: [f.join() for f in feeders] and ready.close()).start()
    taken = taken_until_exhausted(ready)
    assert sorted(taken) == expected
    if order == "input" and num_feeders == 1:
        assert taken == expected
    assert [answer for feeder in feeders for answer in feeder.answers] == [True] * len(chunks)


def test_the_reader_is_three_buffers_ahead_at_most() -> None:
    """One is worked off, one is in order, one is being filled."""
    ready = ready_of(max_tokens=4)
    feeder = Feeder(ready, [chunk_of(100 * n, 4) for n in range(5)])
    assert eventually(lambda: feeder.num_put == 2)
    time.sleep(0.05)
    assert feeder.num_put == 2
    assert ready.take()  # begins with the first buffer
    assert eventually(lambda: feeder.num_put == 3)
    for _ in range(3):
        assert ready.take()
    time.sleep(0.05)
    assert feeder.num_put == 3
    assert ready.take()
    assert eventually(lambda: feeder.num_put == 4)
    assert len(taken_until_exhausted(ready)) == 5 * 4 - 5
    feeder.join()


def test_kept_columns_hold_the_reader_back_as_tokens_do() -> None:
    chunk = chunk_of(0, 4)
    ready = ready_of(max_carried_bytes=chunk.carried_bytes)
    feeder = Feeder(ready, [chunk, *(chunk_of(100 * n, 4) for n in range(1, 4))])
    assert eventually(lambda: feeder.num_put == 2)
    time.sleep(0.05)
    assert feeder.num_put == 2
    assert ready.take()
    assert eventually(lambda: feeder.num_put == 3)
    ready.close()
    feeder.join()


def test_chunks_of_a_buffer_are_put_in_order_together() -> None:
    """Rows of one prefix, in chunks that were read one after the other, are neighbours."""
    chunks = [chunk_of(100 * n, 3, row_tokens=256) for n in range(4)]
    for chunk in chunks:
        chunk.token_ids = np.repeat(np.array([7, 8, 9], np.int32), 256)
    ready = ready_of(order="prefix")
    Feeder(ready, chunks).join()
    prefixes = [row % 100 for row, _ in taken_until_exhausted(ready)]
    assert len(list(groupby(prefixes))) == 3


def test_a_chunk_with_nothing_to_do_is_put_and_never_seen() -> None:
    ready = ready_of(max_tokens=1)
    for _ in range(10):
        assert ready.put(chunk_of(0, 3, failed=(0, 1, 2)))
    assert not ready.wait(0)
    assert ready.take() is None


def test_what_is_there_is_taken_though_the_buffer_is_not_full() -> None:
    ready = ready_of()
    assert ready.put(chunk_of(0, 2))
    assert ready.wait(0)
    assert ready.take()
    assert ready.put(chunk_of(100, 2))
    assert [ready.take() is not None for _ in range(4)] == [True, True, True, False]


def test_prompts_are_released_once_they_were_requested() -> None:
    ready, chunk = ready_of(), chunk_of(0, 2)
    ready.put(chunk)
    assert ready.take()
    assert ready.take()
    assert len(chunk.token_ids)
    assert ready.take() is None
    assert not len(chunk.token_ids)
    assert chunk.num_prompt_tokens(1) == 1


def test_closing_ends_a_waiting_put_and_what_is_ready_can_still_be_taken() -> None:
    ready = ready_of(max_tokens=2)
    feeder = Feeder(ready, [chunk_of(100 * n, 2) for n in range(3)])
    assert eventually(lambda: feeder.num_put == 2)
    ready.close()
    feeder.join()
    assert feeder.answers == [True, True, False]
    assert not ready.is_exhausted
    assert taken_until_exhausted(ready) == [(0, 0), (1, 0), (100, 0), (101, 0)]
    assert not ready.put(chunk_of(200, 1))


def test_waiting_ends_when_something_is_put_and_when_the_queue_is_closed() -> None:
    ready = ready_of()
    started_s = time.monotonic()
    threading.Timer(0.05, lambda: ready.put(chunk_of(0, 1))).start()
    assert ready.wait(5)
    assert ready.take() is not None
    assert ready.take() is None
    threading.Timer(0.05, ready.close).start()
    assert not ready.wait(5)
    assert time.monotonic() - started_s < 4


def test_nothing_is_ready_while_a_buffer_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the engine's thread would ask again and again, and slow down what it waits for."""
    ready, began, may_plan = ready_of(max_tokens=2), threading.Event(), threading.Event()

    def slow(chunks: list[Chunk], order: str) -> Buffer:
        began.set()
        may_plan.wait(5)
        return plan_buffer(chunks, order)

    monkeypatch.setattr(ready_module, "plan_buffer", slow)
    feeders = [Feeder(ready, [chunk_of(100 * n, 2)], closes=False) for n in range(3)]
    assert began.wait(5)
    assert eventually(lambda: sum(f.num_put for f in feeders) == 2)
    assert not ready.wait(0.05)
    assert ready.take() is None
    may_plan.set()
    assert ready.wait(5)
    assert ready.take() is not None
