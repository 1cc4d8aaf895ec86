"""Time, passed in to whoever needs it.

Wall time is the wall clock at the start plus what the monotonic clock counted since, so a clock
that is set during a run (NTP, an operator) never makes its timestamps run backwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime


class Clock:
    """One for each process; thread-safe, as it never changes."""

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._offset_ns = wall_ns() - monotonic_ns()

    def monotonic(self) -> float:
        """Seconds, for durations."""
        return self._monotonic_ns() / 1e9

    def wall_us(self) -> int:
        """Microseconds since the epoch."""
        return (self._monotonic_ns() + self._offset_ns) // 1000

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self.wall_us() / 1e6

    def utc(self) -> str:
        """Now, as in `2026-11-21T12:30:01.250Z`."""
        return utc_text(self.wall())


def utc_text(wall_s: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def utc_seconds(text: str) -> float:
    """The inverse of `utc_text`. Raises ValueError for anything but an ISO 8601 time."""
    return datetime.fromisoformat(text).timestamp()
