"""The writer: buffers finished rows by (shard, window), and has them published when they are due.

One thread owns all state; what is published (`publishing`) is so in a small pool, so that a slow
write holds up neither the engine nor other writes. What it holds is bounded in bytes: `put` waits
when storage is slower than the engine. Must not know: engines, prompts, where rows come from, what
is in a file.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

from batchinfer.config import CheckpointSettings
from batchinfer.errors import InputError
from batchinfer.ledger import Ledger, PartId, Totals
from batchinfer.runner.claims import ClaimWatcher, Unwatched
from batchinfer.runner.flush import FlushPolicy
from batchinfer.runner.host import Host
from batchinfer.runner.publishing import FoldAbandonedError, Publishing, ResultTables
from batchinfer.runner.shard_progress import ShardProgress
from batchinfer.tasks import Result

NUM_PUBLISHERS = 2
NUM_REMOTE_PUBLISHERS = 4  # they wait more than they work
#: Counted as in `Result.size_bytes`; small rows take about twice as much, as Python objects.
MAX_HELD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _WindowRead:
    claim: str
    window: int
    num_expected: int
    num_done: int


@dataclass(frozen=True, slots=True)
class _Published:
    claim: str
    num_bytes: int
    is_fold: bool


@dataclass(frozen=True, slots=True)
class _Drain:
    finish_shards: bool


_Event = list[Result] | ShardProgress | _WindowRead | _Published | _Drain


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
        watcher: ClaimWatcher | None = None,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._watcher: ClaimWatcher = watcher or Unwatched()
        self._publishing = Publishing(
            ledger, tables, host, on_first_durable, self._is_stopping, self._watcher
        )
        self._stop = host.stop
        self._run = tables.run
        self._max_held_bytes = max_held_bytes
        self._flushes = FlushPolicy(settings.every_rows, settings.every_s, max_held_bytes // 2)
        self._changed = threading.Condition()
        self._events: deque[_Event] = deque()
        self._held_bytes = 0
        self._shards: dict[str, ShardProgress] = {}  # by name of the claim
        self._sequence = tables.first_sequence
        self._may_finish = True
        self._num_publishers = NUM_PUBLISHERS if ledger.store.is_local else NUM_REMOTE_PUBLISHERS
        self._pool = ThreadPoolExecutor(self._num_publishers, thread_name_prefix="publish")
        self._num_writing = 0  # what the pool has: folds are not among it
        # Of its own: a fold of a large shard takes minutes, and parts must not wait behind it.
        self._folds = ThreadPoolExecutor(1, thread_name_prefix="fold")
        self._thread = threading.Thread(target=self._run_thread, name="writer", daemon=True)
        self.error: BaseException | None = None  # the first that ends the run
        self.input_errors: dict[str, InputError] = {}  # shards that changed; the others continue

    @property
    def finished(self) -> Mapping[str, Totals]:
        return MappingProxyType(self._publishing.finished)

    def start(self) -> None:
        self._thread.start()

    def open_shard(self, shard: ShardProgress) -> None:
        """Before the first of its windows or results. It is the writer's from then on."""
        self._post(shard)

    def window_read(self, claim: str, window: int, num_expected: int, num_done: int) -> None:
        """A window was read: how many results it must have, and how many are durable already.

        With its last window a claim is read; it is finished once all its results are in. `claim`:
        its name, of a whole shard the shard's.
        """
        self._post(_WindowRead(claim, window, num_expected, num_done))

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
                self._shards[event.claim_name] = event
                self._finish_if_complete(event)  # it may have no window
            case _WindowRead():
                shard = self._shards[event.claim]
                shard.window_read(event.window, event.num_expected, event.num_done)
                self._finish_if_complete(shard)
            case _Published():
                self._release(event)

    def _buffer(self, results: list[Result]) -> None:
        for result in results:
            self._shards[result.chunk.claim_name].add(result)
        num_bytes = sum(result.size_bytes for result in results)
        self._flushes.add(len(results), num_bytes, time.monotonic())
        for name in {result.chunk.claim_name for result in results}:
            self._finish_if_complete(self._shards[name])

    def _release(self, event: _Published) -> None:
        shard = self._shards[event.claim]
        shard.end_publishing()
        self._num_writing -= not event.is_fold
        with self._changed:
            self._held_bytes -= event.num_bytes
            self._changed.notify_all()
        if shard.is_finishing:
            del self._shards[event.claim]  # finished, or given up with an error
        else:
            self._finish_if_complete(shard)

    def _finish_if_complete(self, shard: ShardProgress) -> None:
        """Rule 1: only when every row that passes the filter has its result is the file written."""
        if not shard.is_complete or not self._may_finish or self.error is not None:
            return
        if shard.is_piece:
            self._end_if_durable(shard)
            return
        if not shard.has_results:
            shard.begin_finishing()
            results = [r for buffer in self._take_buffers(shard).values() for r in buffer]
            self._submit(shard, results, lambda: self._publishing.whole(shard, results))
            return
        for window, results in self._take_buffers(shard).items():
            self._submit_part(shard, window, results)
        if shard.num_publishing == 0:
            shard.begin_finishing()
            self._submit(shard, [], lambda: self._publishing.fold(shard), self._folds)

    def _end_if_durable(self, shard: ShardProgress) -> None:
        for window, results in self._take_buffers(shard).items():
            self._submit_part(shard, window, results)
        if shard.num_publishing == 0:
            del self._shards[shard.claim_name]
            num_expected = sum(shard.num_expected.values())
            self._watcher.ended(shard.claim_name, num_expected, shard.schema)

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
        part = PartId(window, self._run, self._sequence)
        self._submit(shard, results, lambda: self._publishing.part(shard, part, results))

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
            except FoldAbandonedError:
                pass  # a stop; the next start folds
            except InputError as error:
                self.input_errors[shard.name] = error
                self._watcher.failed(shard.claim_name, error)
            except BaseException as error:  # the thread's edge: the main thread raises it
                self._fail(error)
            finally:
                self._post(_Published(shard.claim_name, num_bytes, is_fold))

        (pool or self._pool).submit(run)  # may raise: no thread to be had
        shard.begin_publishing()
        self._num_writing += not is_fold

    def _is_stopping(self) -> bool:
        return self._stop.is_requested or self.error is not None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
