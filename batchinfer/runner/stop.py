"""Whether a run is to stop, why, and with which exit code: an event that others wait on.

Asked for from outside (a signal's watchdog, the program that runs a job) or by
`limits.max_seconds`, which needs nobody to watch: whoever looks after it has passed finds it. Must
not know: signals, processes, what is being stopped.
"""

from __future__ import annotations

import threading
import time

#: After a stop storage may go on retrying for so long; then a failing write is given up.
RETRY_GRACE_S = 10.0
MAX_SECONDS_CODE = 75


class Stop:
    """Set once, from any thread; never taken back. One for each run."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._deadline_s: float | None = None
        self._requested_s: float | None = None
        self._is_admitting = False
        self._was_admitting = False
        self._is_giving_up = False
        self._code = 0
        self._reason = ""
        self._waiting: list[threading.Event] = []
        self._lock = threading.Lock()

    @property
    def is_requested(self) -> bool:
        if self._requested_s is not None:
            return True
        if self._deadline_s is None or time.monotonic() < self._deadline_s:
            return False
        self.request(MAX_SECONDS_CODE, "limits.max_seconds is over")
        return True

    @property
    def code(self) -> int:
        """The exit code of a process that was stopped so."""
        return self._code

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def requested_s(self) -> float | None:
        """When it was first asked for, monotonic."""
        return self._requested_s

    @property
    def deadline_s(self) -> float | None:
        """When `limits.max_seconds` is over, monotonic."""
        return self._deadline_s

    @property
    def was_admitting(self) -> bool:
        """Whether rows had been admitted when the stop was asked for: then there is a flush."""
        return self._was_admitting

    def request(self, code: int, reason: str) -> None:
        """Ask for a stop; the first reason counts. Wakes all who wait."""
        with self._lock:
            if self._requested_s is not None:
                return
            self._code, self._reason = code, reason
            self._was_admitting = self._is_admitting
            self._requested_s = time.monotonic()
            waiting = list(self._waiting)
        for event in waiting:
            event.set()

    def set_max_seconds(self, max_seconds: float | None) -> None:
        """`limits.max_seconds`, counted from the making of this object."""
        if max_seconds is not None:
            self._deadline_s = self._started_s + max_seconds

    def begin_admission(self) -> bool:
        """The first row is about to be admitted: from now on a stop flushes. False: stop now."""
        is_requested = self.is_requested
        with self._lock:
            self._is_admitting = True
            return not is_requested and self._requested_s is None

    def should_give_up(self) -> bool:
        """Whether storage should stop retrying: the flush after a stop has only so long."""
        requested_s = self._requested_s
        return self._is_giving_up or (
            requested_s is not None and time.monotonic() > requested_s + RETRY_GRACE_S
        )

    def give_up_retrying(self) -> None:
        """The run has failed already: what is left to write gets one try."""
        self._is_giving_up = True

    def wake(self, event: threading.Event) -> None:
        """Set `event` when a stop is asked for: it waits for that among other things."""
        with self._lock:
            self._waiting.append(event)
            is_late = self._requested_s is not None
        if is_late:
            event.set()

    def forget(self, event: threading.Event) -> None:
        with self._lock:
            if event in self._waiting:
                self._waiting.remove(event)
