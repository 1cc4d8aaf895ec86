"""What is between the reader and the engine: chunks in, work items in order of admission out.

Chunks gather in a buffer, which goes from left to right, at most one in each place:

    put ──► filling ──► being planned ──► planned ──► current ──► take

- filling → being planned: by `put`, in the reader's thread, if a chunk does not fit any more and
  nothing is planned; by `take`, in the engine's, if it has worked off all else (then what is there
  is enough: an idle engine costs more than a worse order). `plan_buffer` runs outside the lock.
- being planned → planned: when it is in order. Until then the engine takes nothing of `filling`.
- planned → current: by `take`, once the one before it is worked off; its prompts are released.

Must not know: where work comes from or goes to. Invariants: work comes out exactly once; `put`
blocks the reader, `take` never waits, but plans a buffer itself (milliseconds) when none is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from batchinfer.plan import Buffer, Chunk, WorkItem, plan_buffer

logger = logging.getLogger("batchinfer.runner")

#: Of a chunk, and of a buffer of chunks: the ids and the kept columns.
MAX_CARRIED_BYTES = 8 << 20
_MAX_ROWS = 65_536


class ReadyWork:
    """A queue of chunks, read out as single work items."""

    def __init__(
        self,
        *,
        order: str,
        max_tokens: int,
        max_carried_bytes: int = MAX_CARRIED_BYTES,
        max_rows: int = _MAX_ROWS,
        on_start: Callable[[str], None] | None = None,
    ) -> None:
        """A buffer takes chunks up to these limits, but at least one. `on_start` is told of each
        claim, by its name, before the first of its items is taken.
        """
        self._order = order
        self._max_tokens = max_tokens
        self._max_carried_bytes = max_carried_bytes
        self._max_rows = max_rows
        self._changed = threading.Condition()
        self._filling: list[Chunk] = []
        self._num_tokens = self._num_bytes = self._num_rows = 0  # of the buffer being filled
        self._planned: Buffer | None = None
        self._is_planning = False
        self._is_closed = False
        self._last_order = ""
        # Of the engine's thread alone:
        self._current: Buffer | None = None
        self._items: Iterator[WorkItem] = iter(())
        self._on_start = on_start
        self._started: set[str] = set()
        self.planned_s = 0.0  # spent in `take` on putting buffers in order

    def put(self, chunk: Chunk) -> bool:
        """Add a chunk; waits while enough is ready. False if the queue was closed meanwhile."""
        if not chunk.is_requested().any():
            return not self._is_closed
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._has_room(chunk))
                if self._is_closed:
                    return False
                if self._fits(chunk):
                    self._add(chunk)
                    self._changed.notify_all()
                    return True
                full = self._begin_planning()
            self._plan(full)

    def take(self) -> WorkItem | None:
        """The next item, None if none is ready."""
        while True:
            item = next(self._items, None)
            if item is not None:
                if self._on_start is not None:
                    self._start(item.chunk.claim_name)
                return item
            if not self._open_next():
                return None

    def _start(self, claim: str) -> None:
        if claim not in self._started:
            self._started.add(claim)
            assert self._on_start is not None
            self._on_start(claim)

    def close(self) -> None:
        """No more chunks will come (or none are wanted). What is ready can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until something is ready or the queue is closed. True if something is ready."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_ready(), timeout_s)
            return self._is_ready()

    @property
    def is_exhausted(self) -> bool:
        """Closed and empty: nothing will ever come."""
        with self._changed:
            return self._is_closed and not self._is_ready() and not self._is_planning

    def _is_ready(self) -> bool:
        """While a buffer is put in order, what fills the next cannot be taken."""
        has_filled = self._filling and not self._is_planning
        return bool(has_filled or self._planned or self._current)

    def mean_prompt_tokens(self) -> float:
        """Of the rows that are ready; 0 where none are."""
        with self._changed:
            ready = [*self._filling, *(self._planned.chunks if self._planned else ())]
        num_rows = sum(len(chunk.rows) for chunk in ready)
        return sum(chunk.num_tokens for chunk in ready) / max(1, num_rows)

    def _has_room(self, chunk: Chunk) -> bool:
        """Whether `chunk` fits, or will once the full buffer is put in order."""
        return self._fits(chunk) or (self._planned is None and not self._is_planning)

    def _fits(self, chunk: Chunk) -> bool:
        return not self._filling or (
            self._num_tokens + chunk.num_tokens <= self._max_tokens
            and self._num_bytes + chunk.carried_bytes <= self._max_carried_bytes
            and self._num_rows + len(chunk.rows) <= self._max_rows
        )

    def _add(self, chunk: Chunk) -> None:
        self._filling.append(chunk)
        self._num_tokens += chunk.num_tokens
        self._num_bytes += chunk.carried_bytes
        self._num_rows += len(chunk.rows)

    def _open_next(self) -> bool:
        """Go on with the next buffer; one that is not full yet is better than an idle engine."""
        with self._changed:
            if self._current is not None:
                self._current.release_prompts()
                self._current = None
            if self._planned is None:
                if self._is_planning or not self._filling:
                    return False
                chunks = self._begin_planning()
        if self._planned is None:
            begun_s = time.monotonic()
            self._plan(chunks)
            self.planned_s += time.monotonic() - begun_s
        with self._changed:
            self._current, self._planned = self._planned, None
            self._changed.notify_all()
        assert self._current is not None
        self._items = self._current.items()
        return True

    def _begin_planning(self) -> list[Chunk]:
        self._is_planning = True
        chunks, self._filling = self._filling, []
        self._num_tokens = self._num_bytes = self._num_rows = 0
        return chunks

    def _plan(self, chunks: list[Chunk]) -> None:
        buffer = None
        try:
            buffer = plan_buffer(chunks, self._order)
        finally:
            with self._changed:
                self._planned = buffer
                self._is_planning = False
                self._changed.notify_all()
        if buffer.order != self._last_order:
            self._last_order = buffer.order
            logger.info("order of admission: %s%s", buffer.order, _shared(buffer, len(chunks)))


def _shared(buffer: Buffer, num_chunks: int) -> str:
    """What an order by prefixes found; the others do not look for it."""
    if not buffer.order.startswith("prefix"):
        return ""
    share = buffer.num_shared_tokens / max(1, buffer.num_prompt_tokens)
    return (
        f" (saves {share:.0%} of {buffer.num_prompt_tokens:,} prompt tokens in {num_chunks} "
        "chunks: shared with the row before, and not cached in any other order)"
    )
