"""The writer: buffers finished rows by (shard, window), makes them durable, finishes shards.

One thread owns all state; Arrow, Parquet and storage work runs in a small pool, so that a slow
write holds up neither the engine nor other writes. What it holds is bounded in bytes: `put` waits
when storage is slower than the engine. Must not know: engines, prompts, where rows come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.config import CheckpointSettings
from batchinfer.errors import InputError
from batchinfer.ledger import Ledger, PartId, Totals
from batchinfer.runner.flush import FlushPolicy
from batchinfer.runner.host import Host
from batchinfer.runner.shard_progress import ShardProgress
from batchinfer.sink import build_table
from batchinfer.tasks import Detokenize, Result, Task
from batchinfer.tasks.base import num_failed
from batchinfer.telemetry import Counters

logger = logging.getLogger("batchinfer.runner")

NUM_PUBLISHERS = 2
NUM_REMOTE_PUBLISHERS = 4  # they wait more than they work
#: Counted as in `Result.size_bytes`; small rows take about twice as much, as Python objects.
MAX_HELD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _WindowRead:
    shard: str
    window: int
    num_expected: int
    num_done: int


@dataclass(frozen=True, slots=True)
class _Published:
    shard: str
    num_bytes: int
    is_fold: bool


@dataclass(frozen=True, slots=True)
class _Drain:
    finish_shards: bool


class _FoldAbandonedError(Exception):
    """A fold that gave way to a stop. Nothing appeared; its parts stand."""


_Event = list[Result] | ShardProgress | _WindowRead | _Published | _Drain


@dataclass(frozen=True, slots=True)
class ResultTables:
    """How results of this run become tables, and what of them is counted."""

    task: Task
    detokenize: Detokenize
    run: int

    def build(self, results: list[Result], schema: pa.Schema) -> pa.Table:
        return build_table(
            results, schema, run=self.run, task=self.task, detokenize=self.detokenize
        )

    def count_durable(self, table: pa.Table, counters: Counters) -> None:
        counters.add_durable(table.num_rows, num_failed(table), self.task.count(table))


class Writer:
    """Start it, feed it from any thread, `drain` it once."""

    def __init__(
        self,
        ledger: Ledger,
        tables: ResultTables,
        settings: CheckpointSettings,
        host: Host,
        *,
        on_first_durable: Callable[[], None] = lambda: None,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._ledger = ledger
        self._tables = tables
        self._host = host
        self._counters = host.counters
        self._on_first_durable = on_first_durable
        self._has_durable = False
        self._max_held_bytes = max_held_bytes
        self._flushes = FlushPolicy(settings.every_rows, settings.every_s, max_held_bytes // 2)
        self._changed = threading.Condition()
        self._events: deque[_Event] = deque()
        self._held_bytes = 0
        self._shards: dict[str, ShardProgress] = {}
        self._sequence = 0
        self._may_finish = True
        self._num_publishers = NUM_PUBLISHERS if ledger.store.is_local else NUM_REMOTE_PUBLISHERS
        self._pool = ThreadPoolExecutor(self._num_publishers, thread_name_prefix="publish")
        self._num_writing = 0  # what the pool has: folds are not among it
        # Of its own: a fold of a large shard takes minutes, and parts must not wait behind it.
        self._folds = ThreadPoolExecutor(1, thread_name_prefix="fold")
        self._thread = threading.Thread(target=self._run_thread, name="writer", daemon=True)
        self.error: BaseException | None = None  # the first that ends the run
        self.input_errors: dict[str, InputError] = {}  # shards that changed; the others go on
        self.finished: dict[str, Totals] = {}

    def start(self) -> None:
        self._thread.start()

    def open_shard(self, shard: ShardProgress) -> None:
        """Before the first of its windows or results. It is the writer's from then on."""
        self._post(shard)

    def window_read(self, shard: str, window: int, num_expected: int, num_done: int) -> None:
        """A window was read: how many results it must have, and how many are durable already.

        With its last window a shard is read; it is finished once all its results are in.
        """
        self._post(_WindowRead(shard, window, num_expected, num_done))

    def put(self, results: list[Result]) -> None:
        """Hand over finished rows; waits while too many bytes wait for storage."""
        num_bytes = sum(r.size_bytes for r in results)
        with self._changed:
            while self._held_bytes >= self._max_held_bytes and self.error is None:
                self._changed.wait(0.5)
            self._held_bytes += num_bytes
            self._events.append(results)
            self._changed.notify_all()

    def drain(self, *, finish_shards: bool) -> None:
        """Make everything durable that can be, then end the thread.

        `finish_shards=False` (a stop): parts only, no folds; the next start folds.
        """
        self._post(_Drain(finish_shards))
        self._thread.join()
        self._pool.shutdown(wait=True)
        self._folds.shutdown(wait=True)

    def _post(self, event: _Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def _run_thread(self) -> None:
        try:
            self._work()
        except BaseException as error:  # a bug must end the run, not the thread alone
            self._fail(error)

    def _work(self) -> None:
        draining: _Drain | None = None
        while True:
            for event in self._next_events():
                try:
                    if isinstance(event, _Drain):
                        draining = event
                        self._may_finish = event.finish_shards
                    else:
                        self._handle(event)
                except Exception as error:  # what else is finished can still be written
                    self._fail(error)
            if draining is not None:
                self._flush()
                if not any(s.num_publishing for s in self._shards.values()):
                    return
            elif self._flushes.is_due(time.monotonic(), is_busy=self._is_busy()):
                self._flush()
                self._flushes.flushed(time.monotonic())

    def _next_events(self) -> list[_Event]:
        with self._changed:
            if not self._events:
                self._changed.wait(self._flushes.wait_s(time.monotonic(), is_busy=self._is_busy()))
            events = list(self._events)
            self._events.clear()
            return events

    def _is_busy(self) -> bool:
        return self._num_writing >= self._num_publishers

    def _handle(self, event: _Event) -> None:
        match event:
            case list():
                self._buffer(event)
            case ShardProgress():
                self._shards[event.name] = event
                self._finish_if_complete(event)  # it may have no window
            case _WindowRead():
                shard = self._shards[event.shard]
                shard.window_read(event.window, event.num_expected, event.num_done)
                self._finish_if_complete(shard)
            case _Published():
                self._release(event)

    def _buffer(self, results: list[Result]) -> None:
        for result in results:
            self._shards[result.chunk.shard].add(result)
        num_bytes = sum(result.size_bytes for result in results)
        self._flushes.add(len(results), num_bytes, time.monotonic())
        for name in {result.chunk.shard for result in results}:
            self._finish_if_complete(self._shards[name])

    def _release(self, event: _Published) -> None:
        shard = self._shards[event.shard]
        shard.end_publishing()
        self._num_writing -= not event.is_fold
        with self._changed:
            self._held_bytes -= event.num_bytes
            self._changed.notify_all()
        if shard.is_finishing:
            del self._shards[event.shard]  # finished, or given up with an error
        else:
            self._finish_if_complete(shard)

    def _finish_if_complete(self, shard: ShardProgress) -> None:
        """Rule 1: only when every row that passes the filter has its result is the file written."""
        if not shard.is_complete or not self._may_finish or self.error is not None:
            return
        if not shard.has_results:
            shard.begin_finishing()
            results = [r for buffer in self._take_buffers(shard).values() for r in buffer]
            self._submit(shard, results, lambda: self._finish_directly(shard, results))
            return
        for window, results in self._take_buffers(shard).items():
            self._submit_part(shard, window, results)
        if shard.num_publishing == 0:
            shard.begin_finishing()
            self._submit(shard, [], lambda: self._fold(shard), self._folds)

    def _flush(self) -> None:
        for shard in self._shards.values():
            for window, results in self._take_buffers(shard).items():
                self._submit_part(shard, window, results)

    def _take_buffers(self, shard: ShardProgress) -> dict[int, list[Result]]:
        buffers = shard.take()
        for results in buffers.values():
            self._flushes.remove(len(results), sum(r.size_bytes for r in results))
        return buffers

    def _submit_part(self, shard: ShardProgress, window: int, results: list[Result]) -> None:
        shard.begin_part()
        self._sequence += 1
        part = PartId(window, self._tables.run, self._sequence)

        def publish() -> None:
            started_s = time.monotonic()
            table = self._tables.build(results, shard.schema)
            self._ledger.publish_part(shard.name, part, table)
            self._count_durable(results, table)
            logger.debug(
                "part published: %s %s, %d rows, %.3f s",
                shard.name,
                part.name,
                len(results),
                time.monotonic() - started_s,
            )

        self._submit(shard, results, publish)

    def _submit(
        self,
        shard: ShardProgress,
        results: Sequence[Result],
        work: Callable[[], None],
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        num_bytes = sum(r.size_bytes for r in results)
        is_fold = pool is self._folds

        def run() -> None:
            try:
                work()  # after an error too: what is finished gets its one try
            except _FoldAbandonedError:
                pass  # a stop; the next start folds
            except InputError as error:
                self.input_errors[shard.name] = error
            except BaseException as error:  # the thread's edge: the main thread raises it
                self._fail(error)
            finally:
                self._post(_Published(shard.name, num_bytes, is_fold))

        (pool or self._pool).submit(run)  # may raise: no thread to be had
        shard.begin_publishing()
        self._num_writing += not is_fold

    def _finish_directly(self, shard: ShardProgress, results: list[Result]) -> None:
        table = self._tables.build(results, shard.schema) if results else None
        num_expected = sum(shard.num_expected.values())
        totals = self._ledger.finish_directly(
            shard.name, shard.schema, table, num_expected, shard.recheck
        )
        self._count_durable(results, table)
        self._note_finished(shard, totals)

    def _fold(self, shard: ShardProgress) -> None:
        totals = self._ledger.finish_shard(
            shard.name, shard.schema, shard.expected_by_window, shard.recheck, self._keep_folding
        )
        self._host.tuning.freed()  # what a fold took, nobody needs until the next
        self._note_finished(shard, totals)

    def _keep_folding(self) -> None:
        if self._host.stop.is_requested or self.error is not None:
            raise _FoldAbandonedError

    def _note_finished(self, shard: ShardProgress, totals: Totals) -> None:
        self.finished[shard.name] = totals
        logger.info(
            "shard finished: %s, %d rows, %d failed", shard.name, totals.rows, totals.rows_failed
        )
        self._counters.add_shard_finished()

    def _count_durable(self, results: Sequence[Result], table: pa.Table | None) -> None:
        if table is not None:
            self._tables.count_durable(table, self._counters)
        if results and not self._has_durable:
            self._has_durable = True
            self._on_first_durable()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
