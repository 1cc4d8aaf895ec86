"""What stands between the reader and the engine: work in order of admission, bounded in rows and
bytes.

Must not know: where work comes from or goes to. Invariant: work comes out exactly once, in the
order put; `put` blocks the reader, never the engine's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from batchinfer.plan import Chunk, WorkItem


class ReadyWork:
    """A queue of chunks, read out as single work items."""

    def __init__(self, *, min_rows: int, max_bytes: int) -> None:
        """The reader is held back while `min_rows` rows or `max_bytes` bytes are ready."""
        self._min_rows = min_rows
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._chunks: deque[tuple[Chunk, Iterator[WorkItem]]] = deque()
        self._num_rows = 0
        self._num_bytes = 0
        self._is_closed = False
        self._last_index, self._num_taken = -1, 0  # of the chunk that is being taken from

    def raise_min_rows(self, min_rows: int) -> None:
        """Once the engine's width is known: keep at least this many rows ready."""
        with self._changed:
            self._min_rows = max(self._min_rows, min_rows)
            self._changed.notify_all()

    def put(self, chunk: Chunk) -> bool:
        """Add a chunk; waits while enough is ready. False if the queue was closed meanwhile."""
        work = chunk.work()
        first = next(work, None)  # plans the order here, in the reader's thread
        with self._changed:
            while not self._is_closed and (
                self._num_rows >= self._min_rows or self._num_bytes >= self._max_bytes
            ):
                self._changed.wait()
            if self._is_closed:
                return False
            if first is not None:
                self._chunks.append((chunk, _chain(first, work)))
                self._num_rows += len(chunk.rows)
                self._num_bytes += len(chunk.rows) * (chunk.size_bytes // len(chunk.rows))
                self._changed.notify_all()
            return True

    def close(self) -> None:
        """No more chunks will come (or none are wanted). What is ready can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def take(self) -> WorkItem | None:
        """The next item, None if none is ready."""
        while self._chunks:
            chunk, work = self._chunks[0]
            item = next(work, None)
            if item is not None:
                if item.index != self._last_index:  # a row's samples are neighbours
                    self._last_index = item.index
                    self._num_taken += 1
                    self._count_out(1, chunk.size_bytes // len(chunk.rows))
                return item
            self._chunks.popleft()
            rest = len(chunk.rows) - self._num_taken  # errors and duplicates never come out
            self._count_out(rest, rest * (chunk.size_bytes // len(chunk.rows)))
            self._last_index, self._num_taken = -1, 0
        return None

    def _count_out(self, num_rows: int, num_bytes: int) -> None:
        with self._changed:
            self._num_rows -= num_rows
            self._num_bytes -= num_bytes
            if self._num_rows < self._min_rows and self._num_bytes < self._max_bytes:
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until something is ready or the queue is closed. True if something is ready."""
        with self._changed:
            if not self._chunks and not self._is_closed:
                self._changed.wait(timeout_s)
            return bool(self._chunks)

    @property
    def is_exhausted(self) -> bool:
        """Closed and empty: nothing will ever come."""
        with self._changed:
            return self._is_closed and not self._chunks


def _chain(first: WorkItem, rest: Iterator[WorkItem]) -> Iterator[WorkItem]:
    yield first
    yield from rest
