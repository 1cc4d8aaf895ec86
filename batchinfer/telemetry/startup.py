"""Where the time from the command to the first engine step goes.

Spans in seconds since the kernel started this process; they overlap where work does. Must not know:
what is done in a span.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StartUp:
    """Made when batchinfer's own imports are over. Each thread may add spans of its own."""

    def __init__(self, *, process_age_s: float | None = None) -> None:
        """`process_age_s`: how long ago the start began; None: with this process."""
        age_s = _process_age_s() if process_age_s is None else process_age_s
        self._origin_s = time.monotonic() - age_s
        #: name -> (begin, end), in order of their ends
        self.spans: dict[str, tuple[float, float]] = {}
        self.total_s: float | None = None  # None: no engine step yet
        self.add("imports", 0.0)

    def now(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._origin_s

    def add(self, name: str, begin_s: float, end_s: float | None = None) -> None:
        """A span from `begin_s` to `end_s`, or until now."""
        self.spans[name] = (begin_s, self.now() if end_s is None else end_s)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin_s = self.now()
        yield
        self.add(name, begin_s)

    def end(self) -> None:
        """The first engine step is over."""
        self.total_s = self.now()

    def as_dict(self) -> dict[str, float | list[float] | None]:
        """`total_s` and [begin, end] of each span, JSON-ready."""
        total_s = None if self.total_s is None else round(self.total_s, 3)
        spans = {name: [round(b, 3), round(e, 3)] for name, (b, e) in self.spans.copy().items()}
        return {"total_s": total_s, **spans}


def _process_age_s() -> float:
    """From the 22nd field of /proc/self/stat, in clock ticks since boot."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
