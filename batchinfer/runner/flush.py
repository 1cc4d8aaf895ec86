"""When buffered rows become parts. Pure: it is given times and asks no clock.

Must not know: threads, storage, rows.
"""

from __future__ import annotations

_FIRST_FLUSH_S = 0.5
#: Of the time since the first row, until that is every_s: what an early kill may cost.
_FLUSH_SHARE = 0.2
_MAX_WAIT_S = 1.0


class FlushPolicy:
    """Counts what is buffered. All times are monotonic seconds."""

    def __init__(self, every_rows: int, every_s: float, max_bytes: int) -> None:
        """A flush is due after a number of rows, of bytes, or of seconds since the oldest row."""
        self._every_rows = every_rows
        self._every_s = every_s
        self._max_bytes = max_bytes
        self._num_rows = 0
        self._num_bytes = 0
        self._oldest_s: float | None = None  # when the first buffered row came
        self._first_s: float | None = None  # when the first row of all came
        self._period_s = min(_FIRST_FLUSH_S, every_s)

    def add(self, num_rows: int, num_bytes: int, now_s: float) -> None:
        """Rows were buffered."""
        self._num_rows += num_rows
        self._num_bytes += num_bytes
        if num_rows and self._oldest_s is None:
            self._oldest_s = now_s
            self._first_s = self._first_s or now_s

    def remove(self, num_rows: int, num_bytes: int) -> None:
        """Rows left the buffers: for a part, or for a finished file."""
        self._num_rows -= num_rows
        self._num_bytes -= num_bytes
        if self._num_rows == 0:
            self._oldest_s = None

    def is_due(self, now_s: float, *, is_busy: bool) -> bool:
        """`is_busy`: all publishers are at work. More parts would only wait, and be smaller."""
        if self._oldest_s is None:
            return False
        if is_busy and now_s < self._oldest_s + self._every_s:
            return False
        return (
            self._num_rows >= self._every_rows
            or self._num_bytes >= self._max_bytes
            or now_s >= self._oldest_s + self._period_s
        )

    def flushed(self, now_s: float) -> None:
        """A flush took place because it was due: the next interval may be longer."""
        if self._first_s is not None:
            share_s = _FLUSH_SHARE * (now_s - self._first_s)
            self._period_s = min(self._every_s, max(self._period_s, share_s))

    def wait_s(self, now_s: float, *, is_busy: bool) -> float:
        """How long nothing can become due without anything new; a second at most."""
        if self._oldest_s is None:
            return _MAX_WAIT_S
        period_s = self._every_s if is_busy else self._period_s
        return max(0.0, min(_MAX_WAIT_S, self._oldest_s + period_s - now_s))
