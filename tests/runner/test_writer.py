"""Finished rows become durable, and a shard is finished exactly when all its results are in."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import CheckpointSettings, SamplingSettings
from batchinfer.engine.demands.completion import Completion
from batchinfer.errors import InputError, TransientError
from batchinfer.ledger import Ledger
from batchinfer.plan import Chunk
from batchinfer.runner import Host
from batchinfer.runner.publishing import ResultTables
from batchinfer.runner.shard_progress import ShardProgress
from batchinfer.runner.writer import Writer
from batchinfer.sink import output_schema
from batchinfer.storage.local import LocalStore
from batchinfer.tasks import Generate, Result
from batchinfer.telemetry import Clock, Counters

TASK = Generate(SamplingSettings())
SCHEMA = output_schema([pa.field("id", pa.int64())], TASK.columns)
WINDOW_ROWS = 4
NUM_WINDOWS = 3
NUM_ROWS = WINDOW_ROWS * NUM_WINDOWS


class Breaking(LocalStore):
    """Fails to publish keys that contain `broken`."""

    broken = "nothing"

    def publish(self, key: str, write: Any) -> None:
        if self.broken in key:
            raise TransientError(f"cannot write {key}")
        super().publish(key, write)


@pytest.fixture
def store(tmp_path: Path) -> Breaking:
    return Breaking(str(tmp_path / "out"))


@pytest.fixture
def ledger(store: Breaking) -> Ledger:
    return Ledger(store, {"digest": "ours"}, WINDOW_ROWS)


def writer_on(
    ledger: Ledger, *, every_rows: int = 5, every_s: float = 60.0, run: int = 1, **options: Any
) -> Writer:
    writer = Writer(
        ledger,
        ResultTables(TASK, lambda flat, offsets: ["x"] * (len(offsets) - 1), run),
        CheckpointSettings(every_rows=every_rows, every_s=every_s),
        Host(Counters(Clock())),
        **options,
    )
    writer.start()
    return writer


def chunk_of(shard: str, window: int) -> Chunk:
    rows = np.arange(window * WINDOW_ROWS, (window + 1) * WINDOW_ROWS, dtype=np.int64)
    return Chunk(
        shard=shard,
        window=window,
        rows=rows,
        token_ids=np.ones(WINDOW_ROWS, dtype=np.int32),
        offsets=np.arange(WINDOW_ROWS + 1, dtype=np.int64),
        carried=pa.table({"id": rows}),
        errors={},
        is_todo=np.ones((WINDOW_ROWS, 1), dtype=np.bool_),
    )


def results_of(shard: str, windows: range = range(NUM_WINDOWS)) -> Iterator[Result]:
    for chunk in (chunk_of(shard, window) for window in windows):
        for index in range(WINDOW_ROWS):
            done = Completion(index, np.array([7, 8], dtype=np.int32), 2, finish_reason="stop")
            yield Result(chunk, index, 0, done, finished_at_us=1)


def shard_of(*, num_windows: int = NUM_WINDOWS, has_results: bool = False) -> ShardProgress:
    return ShardProgress("a.parquet", SCHEMA, num_windows, lambda: None, has_results)


def open_shard(
    writer: Writer,
    shard: str,
    *,
    recheck: Callable[[], None] = lambda: None,
    num_windows: int = NUM_WINDOWS,
    has_parts: bool = False,
) -> None:
    writer.open_shard(ShardProgress(shard, SCHEMA, num_windows, recheck, has_results=has_parts))
    for window in range(num_windows):
        writer.window_read(shard, window, WINDOW_ROWS, 0)


def rows_of_finished(store: LocalStore, shard: str) -> list[int]:
    return pq.read_table(io.BytesIO(store.read(shard))).column("row").to_pylist()


def durable_rows(ledger: Ledger, shard: str) -> set[int]:
    keys = ledger.keys_of_parts(shard, ledger.parts_of(shard))
    return set(keys.row.tolist())


@pytest.mark.parametrize("every_rows", [1, 5, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_shards_are_finished_whatever_the_order_of_their_results(
    store: Breaking, ledger: Ledger, every_rows: int, seed: int
) -> None:
    shards = ["a.parquet", "b.parquet", "c.parquet"]
    writer = writer_on(ledger, every_rows=every_rows)
    for shard in shards:
        open_shard(writer, shard)
    results = [result for shard in shards for result in results_of(shard)]
    chosen = random.Random(seed)
    chosen.shuffle(results)
    while results:
        size = chosen.randint(1, 4)
        writer.put(results[:size])
        del results[:size]
    writer.drain(finish_shards=True)
    assert writer.error is None
    for shard in shards:
        assert rows_of_finished(store, shard) == list(range(NUM_ROWS))
        assert ledger.parts_of(shard) == []
        assert writer.finished[shard].rows == NUM_ROWS


@pytest.mark.parametrize("missing", ["a result", "the end of reading", "a window"])
def test_a_shard_is_not_finished_before_everything_is_in(
    store: Breaking, ledger: Ledger, missing: str
) -> None:
    writer = writer_on(ledger)
    num_windows = NUM_WINDOWS + (missing == "a window")
    writer.open_shard(shard_of(num_windows=num_windows))
    for window in range(num_windows - (missing == "the end of reading")):
        writer.window_read("a.parquet", window, WINDOW_ROWS, 0)
    results = [*results_of("a.parquet")]
    writer.put(results[:-1] if missing == "a result" else results)
    writer.drain(finish_shards=True)
    assert writer.error is None
    assert store.stat("a.parquet") is None
    assert len(durable_rows(ledger, "a.parquet")) == NUM_ROWS - (missing == "a result")


def test_a_shard_without_rows_gets_a_file(store: Breaking, ledger: Ledger) -> None:
    writer = writer_on(ledger)
    open_shard(writer, "empty.parquet", num_windows=0)
    writer.drain(finish_shards=True)
    assert rows_of_finished(store, "empty.parquet") == []


def test_what_an_earlier_run_left_is_folded_in(store: Breaking, ledger: Ledger) -> None:
    first = writer_on(ledger)
    open_shard(first, "a.parquet")
    first.put([*results_of("a.parquet", range(2))])
    first.drain(finish_shards=True)
    second = writer_on(ledger, run=2)
    second.open_shard(shard_of(has_results=True))
    for window in range(NUM_WINDOWS):
        second.window_read("a.parquet", window, WINDOW_ROWS, WINDOW_ROWS if window < 2 else 0)
    second.put([*results_of("a.parquet", range(2, 3))])
    second.drain(finish_shards=True)
    assert second.error is None
    assert rows_of_finished(store, "a.parquet") == list(range(NUM_ROWS))


def test_a_stop_writes_parts_only(store: Breaking, ledger: Ledger) -> None:
    writer = writer_on(ledger, every_rows=10_000)
    writer.open_shard(shard_of(has_results=True))
    for window in range(NUM_WINDOWS):
        writer.window_read("a.parquet", window, WINDOW_ROWS, 0)
    results = [*results_of("a.parquet")]
    writer.put(results[:-1])
    writer.drain(finish_shards=False)
    assert writer.error is None
    assert store.stat("a.parquet") is None
    assert durable_rows(ledger, "a.parquet") == set(range(NUM_ROWS - 1))


@pytest.mark.parametrize("broken", ["parts/b.parquet", "b.parquet"])
def test_a_failed_write_of_one_shard_keeps_the_rows_of_the_others(
    store: Breaking, ledger: Ledger, broken: str
) -> None:
    store.broken = broken
    writer = writer_on(ledger, every_rows=3)
    shards = ["a.parquet", "b.parquet", "c.parquet"]
    for shard in shards:
        open_shard(writer, shard, has_parts=broken.startswith("parts"))  # else written at once
    for results in zip(*(results_of(shard) for shard in shards), strict=True):
        writer.put([*results])
    writer.drain(finish_shards=True)
    assert isinstance(writer.error, TransientError)
    assert store.stat("b.parquet") is None
    for shard in ("a.parquet", "c.parquet"):
        if store.stat(shard) is None:
            assert durable_rows(ledger, shard) == set(range(NUM_ROWS))
        else:
            assert rows_of_finished(store, shard) == list(range(NUM_ROWS))


def test_a_shard_that_changed_is_given_up_and_the_others_continue(
    store: Breaking, ledger: Ledger
) -> None:
    def recheck() -> NoReturn:
        raise InputError("a.parquet changed")

    writer = writer_on(ledger)
    open_shard(writer, "a.parquet", recheck=recheck)
    open_shard(writer, "b.parquet")
    writer.put([*results_of("a.parquet"), *results_of("b.parquet")])
    writer.drain(finish_shards=True)
    assert writer.error is None
    assert writer.input_errors.keys() == {"a.parquet"}
    assert writer.finished.keys() == {"b.parquet"}
    assert store.stat("a.parquet") is None


@pytest.mark.parametrize("is_complete", [True, False])
def test_no_thread_to_be_had_is_an_error_and_not_a_hang(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, is_complete: bool
) -> None:
    def no_thread(*args: Any) -> NoReturn:
        raise RuntimeError("can't start new thread")

    writer = writer_on(ledger, every_rows=1)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", no_thread)
    open_shard(writer, "a.parquet")
    results = [*results_of("a.parquet")]
    writer.put(results if is_complete else results[:3])
    writer.drain(finish_shards=True)
    assert isinstance(writer.error, RuntimeError)
    writer.put(results)  # nobody waits after an error


def test_what_waits_for_storage_is_bounded_in_bytes(ledger: Ledger, store: Breaking) -> None:
    writer = writer_on(ledger, max_held_bytes=4000)
    most = 0
    publish = ledger.store.publish

    def watched(key: str, write: Any) -> None:
        nonlocal most
        most = max(most, writer._held_bytes)
        publish(key, write)

    store.publish = watched  # type: ignore[method-assign]
    open_shard(writer, "a.parquet")
    for result in results_of("a.parquet"):
        writer.put([result])
    writer.drain(finish_shards=True)
    assert writer.error is None
    assert 0 < most < 4000 + 2 * 700
    assert writer._held_bytes == 0
    assert rows_of_finished(store, "a.parquet") == list(range(NUM_ROWS))


@pytest.mark.parametrize(("every_s", "num_parts"), [(0.2, 3), (60.0, 2)])
def test_while_all_publishers_are_busy_a_part_is_begun_only_after_every_s(
    ledger: Ledger, store: Breaking, every_s: float, num_parts: int
) -> None:
    may_write = threading.Event()
    publish = ledger.store.publish

    def waiting(key: str, write: Any) -> None:
        may_write.wait(20)
        publish(key, write)

    store.publish = waiting  # type: ignore[method-assign]
    writer = writer_on(ledger, every_rows=1, every_s=every_s)
    writer.open_shard(shard_of())
    results = results_of("a.parquet")
    for num_writing in (1, 2):
        writer.put([next(results)])
        assert eventually(lambda n=num_writing: writer._num_writing == n)
    writer.put([next(results)])
    assert eventually(lambda: writer._num_writing == num_parts)
    time.sleep(0.1)
    assert writer._num_writing == num_parts
    may_write.set()
    writer.drain(finish_shards=False)
    assert durable_rows(ledger, "a.parquet") == {0, 1, 2}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()
