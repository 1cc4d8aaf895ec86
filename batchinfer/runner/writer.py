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
from dataclasses import dataclass, field

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.ledger import Ledger, PartId, Totals
from batchinfer.runner.malloc import return_freed_pages
from batchinfer.sink import build_table
from batchinfer.tasks import Detokenize, Result, Task
from batchinfer.tasks.base import num_failed
from batchinfer.telemetry import Counters

logger = logging.getLogger("batchinfer.runner")

NUM_PUBLISHERS = 2
NUM_REMOTE_PUBLISHERS = 4  # they wait more than they work
#: Counted as in `Result.size_bytes`; small rows take about twice as much, as Python objects.
MAX_HELD_BYTES = 16 << 20
_FIRST_FLUSH_S = 0.5
#: Of the time since the first row, until that is every_s: what an early kill may cost.
_FLUSH_SHARE = 0.2


@dataclass(slots=True, eq=False)
class ShardOutput:
    """A shard that is being computed, as the writer sees it."""

    name: str
    schema: pa.Schema
    recheck: Callable[[], None]  # raises InputError if the shard changed since it was listed
    has_parts: bool  # or a finished file: results that are not in our hands
    buffers: dict[int, list[Result]] = field(default_factory=dict)  # by window
    num_expected: list[int] = field(default_factory=list)  # by window
    num_expected_total: int = 0
    num_done: int = 0
    num_publishing: int = 0
    is_read: bool = False
    is_finishing: bool = False

    @property
    def is_complete(self) -> bool:
        return self.is_read and self.num_done == self.num_expected_total


@dataclass(frozen=True, slots=True)
class _WindowRead:
    shard: str
    window: int
    num_expected: int
    num_done: int


@dataclass(frozen=True, slots=True)
class _ShardRead:
    shard: str


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


_Event = list[Result] | ShardOutput | _WindowRead | _ShardRead | _Published | _Drain


class Writer:
    """Start it, feed it from any thread, `drain` it once."""

    def __init__(
        self,
        ledger: Ledger,
        counters: Counters,
        *,
        run: int,
        every_rows: int,
        every_s: float,
        detokenize: Detokenize,
        task: Task,
        should_stop: Callable[[], bool] = lambda: False,
        on_first_durable: Callable[[], None] = lambda: None,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._ledger = ledger
        self._counters = counters
        self._run = run
        self._every_rows = every_rows
        self._every_s = every_s
        self._detokenize = detokenize
        self._task = task
        self._should_stop = should_stop
        self._on_first_durable = on_first_durable
        self._has_durable = False
        self._max_held_bytes = max_held_bytes
        self._changed = threading.Condition()
        self._events: deque[_Event] = deque()
        self._held_bytes = 0
        self._shards: dict[str, ShardOutput] = {}
        self._num_buffered = 0
        self._buffered_bytes = 0
        self._oldest_s: float | None = None  # monotonic time of the first buffered row
        self._flush_s = min(_FIRST_FLUSH_S, every_s)
        self._first_s: float | None = None  # monotonic time of the first row of all
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

    def open_shard(self, shard: ShardOutput) -> None:
        self._post(shard)

    def window_read(self, shard: str, window: int, num_expected: int, num_done: int) -> None:
        """A window was read: it must have so many results, and so many are durable already."""
        self._post(_WindowRead(shard, window, num_expected, num_done))

    def shard_read(self, shard: str) -> None:
        """The shard was read to its end; it is finished once all its results are in."""
        self._post(_ShardRead(shard))

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
            elif self._is_flush_due():
                self._flush()
                assert self._first_s is not None
                share_s = _FLUSH_SHARE * (time.monotonic() - self._first_s)
                self._flush_s = min(self._every_s, max(self._flush_s, share_s))

    def _next_events(self) -> list[_Event]:
        with self._changed:
            if not self._events:
                self._changed.wait(self._wait_s())
            events = list(self._events)
            self._events.clear()
            return events

    def _wait_s(self) -> float:
        if self._oldest_s is None:
            return 1.0
        period_s = self._every_s if self._is_busy() else self._flush_s
        return max(0.0, min(1.0, self._oldest_s + period_s - time.monotonic()))

    def _is_busy(self) -> bool:
        return self._num_writing >= self._num_publishers

    def _is_flush_due(self) -> bool:
        if self._oldest_s is None:
            return False
        if self._is_busy() and time.monotonic() < self._oldest_s + self._every_s:
            return False  # more parts would only wait, and be smaller
        return (
            self._num_buffered >= self._every_rows
            or self._buffered_bytes >= self._max_held_bytes // 2
            or time.monotonic() >= self._oldest_s + self._flush_s
        )

    def _handle(self, event: _Event) -> None:
        if isinstance(event, list):
            for result in event:
                shard = self._shards[result.chunk.shard]
                shard.buffers.setdefault(result.chunk.window, []).append(result)
                shard.num_done += 1
                self._num_buffered += 1
                self._buffered_bytes += result.size_bytes
            if event and self._oldest_s is None:
                self._oldest_s = time.monotonic()
                self._first_s = self._first_s or self._oldest_s
            touched = {result.chunk.shard for result in event}
        elif isinstance(event, ShardOutput):
            self._shards[event.name] = event
            touched = set()
        elif isinstance(event, _WindowRead):
            shard = self._shards[event.shard]
            shard.num_expected.extend([0] * (event.window + 1 - len(shard.num_expected)))
            shard.num_expected[event.window] = event.num_expected
            shard.num_expected_total += event.num_expected
            shard.num_done += event.num_done
            touched = set()
        elif isinstance(event, _ShardRead):
            self._shards[event.shard].is_read = True
            touched = {event.shard}
        else:
            assert isinstance(event, _Published)
            shard = self._shards[event.shard]
            shard.num_publishing -= 1
            self._num_writing -= not event.is_fold
            with self._changed:
                self._held_bytes -= event.num_bytes
                self._changed.notify_all()
            if shard.is_finishing:
                del self._shards[event.shard]  # finished, or given up with an error
                return
            touched = {event.shard}
        for name in touched:
            self._finish_if_complete(self._shards[name])

    def _finish_if_complete(self, shard: ShardOutput) -> None:
        """Rule 1: only when every row that passes the filter has its result is the file written."""
        if not shard.is_complete or not self._may_finish or self.error is not None:
            return
        if not shard.has_parts:
            shard.is_finishing = True
            results = [r for buffer in self._take_buffers(shard).values() for r in buffer]
            self._submit(shard, results, lambda: self._finish_directly(shard, results))
            return
        for window, results in self._take_buffers(shard).items():
            self._submit_part(shard, window, results)
        if shard.num_publishing == 0:
            shard.is_finishing = True
            self._submit(shard, [], lambda: self._fold(shard), self._folds)

    def _flush(self) -> None:
        for shard in self._shards.values():
            for window, results in self._take_buffers(shard).items():
                self._submit_part(shard, window, results)

    def _take_buffers(self, shard: ShardOutput) -> dict[int, list[Result]]:
        buffers, shard.buffers = shard.buffers, {}
        for results in buffers.values():
            self._num_buffered -= len(results)
            self._buffered_bytes -= sum(r.size_bytes for r in results)
        if self._num_buffered == 0:
            self._oldest_s = None
        return buffers

    def _submit_part(self, shard: ShardOutput, window: int, results: list[Result]) -> None:
        shard.has_parts = True
        self._sequence += 1
        part = PartId(window, self._run, self._sequence)

        def publish() -> None:
            started_s = time.monotonic()
            table = self._table(shard, results)
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
        shard: ShardOutput,
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
        shard.num_publishing += 1
        self._num_writing += not is_fold

    def _finish_directly(self, shard: ShardOutput, results: list[Result]) -> None:
        table = self._table(shard, results) if results else None
        num_expected = sum(shard.num_expected)
        totals = self._ledger.finish_directly(
            shard.name, shard.schema, table, num_expected, shard.recheck
        )
        self._count_durable(results, table)
        self._note_finished(shard, totals)

    def _fold(self, shard: ShardOutput) -> None:
        totals = self._ledger.finish_shard(
            shard.name, shard.schema, shard.num_expected, shard.recheck, self._keep_folding
        )
        return_freed_pages()  # what a fold took, nobody needs until the next
        self._note_finished(shard, totals)

    def _keep_folding(self) -> None:
        if self._should_stop() or self.error is not None:
            raise _FoldAbandonedError

    def _note_finished(self, shard: ShardOutput, totals: Totals) -> None:
        self.finished[shard.name] = totals
        logger.info(
            "shard finished: %s, %d rows, %d failed", shard.name, totals.rows, totals.rows_failed
        )
        self._counters.add_shard_finished()

    def _table(self, shard: ShardOutput, results: list[Result]) -> pa.Table:
        return build_table(
            results,
            shard.schema,
            run=self._run,
            task=self._task,
            detokenize=self._detokenize,
        )

    def _count_durable(self, results: Sequence[Result], table: pa.Table | None) -> None:
        if table is not None:
            self._counters.add_durable(table.num_rows, num_failed(table), self._task.count(table))
        if results and not self._has_durable:
            self._has_durable = True
            self._on_first_durable()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
