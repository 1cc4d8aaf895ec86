"""Between reader and engine: work comes out once and in order, and the reader alone waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import RowError
from batchinfer.plan import Chunk
from batchinfer.runner.ready import ReadyWork

NO_LIMIT = 1 << 40


def chunk_of(
    first_row: int, num_rows: int, *, num_samples: int = 1, failed: tuple[int, ...] = ()
) -> Chunk:
    """Rows of one token each, in the order of the file."""
    return Chunk(
        shard="a.parquet",
        window=0,
        rows=np.arange(first_row, first_row + num_rows, dtype=np.int64),
        token_ids=np.arange(num_rows, dtype=np.int32),
        offsets=np.arange(num_rows + 1, dtype=np.int64),
        carried=pa.table({"id": pa.array(range(num_rows), pa.int64())}),
        errors={index: RowError("empty_prompt", "no tokens") for index in failed},
        is_todo=np.ones((num_rows, num_samples), dtype=np.bool_),
        order="input",
    )


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
            taken.append((int(item.chunk.rows[item.index]), item.sample))
    return taken


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), max_size=8),
    num_samples=st.integers(1, 3),
    min_rows=st.integers(1, 20),
    max_bytes=st.sampled_from([1, 30, NO_LIMIT]),
    data=st.data(),
)
def test_everything_comes_out_once_and_in_order(
    sizes: list[int], num_samples: int, min_rows: int, max_bytes: int, data: st.DataObject
) -> None:
    chunks, expected = [], []
    for number, size in enumerate(sizes):
        failed = data.draw(st.sets(st.integers(0, size - 1)))
        first = number * 100
        chunks.append(chunk_of(first, size, num_samples=num_samples, failed=tuple(failed)))
        expected += [
            (first + i, s) for i in range(size) if i not in failed for s in range(num_samples)
        ]
    ready = ReadyWork(min_rows=min_rows, max_bytes=max_bytes)
    feeder = Feeder(ready, chunks)
    assert taken_until_exhausted(ready) == expected
    feeder.join()
    assert feeder.answers == [True] * len(chunks)


def test_put_waits_while_enough_is_ready_and_goes_on_as_rows_are_taken_one_by_one() -> None:
    ready = ReadyWork(min_rows=6, max_bytes=NO_LIMIT)
    feeder = Feeder(ready, [chunk_of(100 * n, 4, num_samples=2) for n in range(4)])
    assert eventually(lambda: feeder.num_put == 2)
    for _ in range(2):  # both samples of a row: 7 rows are ready still
        assert ready.take()
    time.sleep(0.05)
    assert feeder.num_put == 2
    for _ in range(2):
        assert ready.take()  # 6 are ready
    time.sleep(0.05)
    assert feeder.num_put == 2
    assert ready.take()  # 5 are ready
    assert eventually(lambda: feeder.num_put == 3)
    assert len(taken_until_exhausted(ready)) == 4 * 4 * 2 - 5
    feeder.join()


def test_bytes_hold_the_reader_back_as_rows_do() -> None:
    chunk = chunk_of(0, 4)
    ready = ReadyWork(min_rows=1000, max_bytes=chunk.size_bytes)
    feeder = Feeder(ready, [chunk, chunk_of(100, 4)])
    assert eventually(lambda: feeder.num_put == 1)
    time.sleep(0.05)
    assert feeder.num_put == 1
    assert ready.take()
    assert eventually(lambda: feeder.num_put == 2)
    feeder.join()


def test_rows_that_never_come_out_do_not_hold_the_reader_back() -> None:
    ready = ReadyWork(min_rows=2, max_bytes=NO_LIMIT)
    feeder = Feeder(ready, [chunk_of(0, 5, failed=(1, 2, 3, 4)), chunk_of(100, 1)], closes=False)
    assert eventually(lambda: feeder.num_put == 1)
    assert ready.take()
    assert ready.take() is None or feeder.num_put == 2
    assert eventually(lambda: feeder.num_put == 2)
    feeder.join()


def test_a_chunk_with_nothing_to_do_is_put_and_never_seen() -> None:
    ready = ReadyWork(min_rows=4, max_bytes=NO_LIMIT)
    for _ in range(10):
        assert ready.put(chunk_of(0, 3, failed=(0, 1, 2)))
    assert not ready.wait(0)
    assert ready.take() is None


def test_closing_ends_a_waiting_put_and_what_is_ready_can_still_be_taken() -> None:
    ready = ReadyWork(min_rows=1, max_bytes=NO_LIMIT)
    feeder = Feeder(ready, [chunk_of(0, 2), chunk_of(100, 2)])
    assert eventually(lambda: feeder.num_put == 1)
    ready.close()
    feeder.join()
    assert feeder.answers == [True, False]
    assert not ready.is_exhausted
    assert taken_until_exhausted(ready) == [(0, 0), (1, 0)]
    assert not ready.put(chunk_of(200, 1))


def test_waiting_ends_when_something_is_put_and_when_the_queue_is_closed() -> None:
    ready = ReadyWork(min_rows=1, max_bytes=NO_LIMIT)
    started_s = time.monotonic()
    threading.Timer(0.05, lambda: ready.put(chunk_of(0, 1))).start()
    assert ready.wait(5)
    assert taken_one(ready)
    threading.Timer(0.05, ready.close).start()
    assert not ready.wait(5)
    assert time.monotonic() - started_s < 4


def taken_one(ready: ReadyWork) -> bool:
    found = ready.take() is not None
    return found and ready.take() is None


def test_a_wider_engine_lets_the_reader_go_on() -> None:
    ready = ReadyWork(min_rows=1, max_bytes=NO_LIMIT)
    feeder = Feeder(ready, [chunk_of(0, 2), chunk_of(100, 2)])
    assert eventually(lambda: feeder.num_put == 1)
    ready.raise_min_rows(3)
    feeder.join()
    assert feeder.num_put == 2
