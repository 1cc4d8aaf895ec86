"""Requests to stop: signals, `limits.max_seconds`; and the watchdog that sees to it that they are
obeyed.

The C-level signal handler writes to a pipe even while the main thread is inside C code (a model
load, an upload); a thread reads it. Before the first admitted row there is nothing to flush: it
ends the process at once. Later it sets `is_requested`, and ends the process itself when the main
thread has not done so in time. A second signal ends it at once. Must not know: what is being
stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable

from batchinfer.signals import STOP_CODES, release_signals

#: From the first signal to the end of the process, at most (schedulers send SIGKILL after 30 s or
#: more).
GRACE_S = 18.0
_LAST_WORDS_S = 1.5
#: Within it, storage may go on retrying for so long; then a failing write is given up.
RETRY_GRACE_S = 10.0


class StopControl:
    """Knows whether to stop, why, and with which exit code. One per process."""

    def __init__(
        self,
        *,
        grace_s: float = GRACE_S,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._started_s = time.monotonic()
        self._deadline_s: float | None = None
        self._grace_s = grace_s
        self._end_process = end_process
        self._requested_s: float | None = None
        self._num_signals = 0
        self._is_admitting = False
        self._is_giving_up = False
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        #: Called in the watchdog's thread before it ends the process: (exit code, reason).
        self.on_abandon: Callable[[int, str], None] = lambda code, reason: None
        #: Called in the watchdog's thread when a stop is first asked for.
        self.on_request: Callable[[], None] = lambda: None
        self.code = 0
        self.reason = ""

    @property
    def is_requested(self) -> bool:
        return self._requested_s is not None

    def should_give_up(self) -> bool:
        """Whether storage should stop retrying: the flush after a stop has only so long."""
        requested_s = self._requested_s
        return self._is_giving_up or (
            requested_s is not None and time.monotonic() > requested_s + RETRY_GRACE_S
        )

    def give_up_retrying(self) -> None:
        """The run has failed already: what is left to write gets one try."""
        self._is_giving_up = True

    def begin_admission(self) -> bool:
        """The first row is about to be admitted: from now on a stop flushes. False: stop now."""
        with self._lock:
            self._is_admitting = True
            return not self.is_requested

    def set_max_seconds(self, max_seconds: float | None) -> None:
        """`limits.max_seconds`, counted from the making of this object."""
        if max_seconds is not None:
            self._deadline_s = self._started_s + max_seconds
            self._wake()

    def _wake(self) -> None:
        """Let the watchdog look at its deadline again."""
        assert self._pipe is not None
        os.write(self._pipe[1], b"\0")

    def watch(self) -> None:
        """Take over the signals. Call in the main thread."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in STOP_CODES:
            signal.signal(number, lambda *_: None)  # the work is done by the watchdog's thread
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        release_signals()

    def _watch(self) -> None:
        assert self._pipe is not None
        while True:
            timeout_s = self._next_timeout_s()
            readable, _, _ = select.select([self._pipe[0]], [], [], timeout_s)
            if readable:
                for number in os.read(self._pipe[0], 64):
                    if number in STOP_CODES:
                        self._on_signal(number)
            elif self.is_requested:
                self._abandon(f"{self.reason}; the flush did not end within {self._grace_s:g} s")
            else:
                self._request(75, "limits.max_seconds is over")

    def _next_timeout_s(self) -> float | None:
        due_s = self._deadline_s
        if self._requested_s is not None:
            due_s = self._requested_s + self._grace_s
        return None if due_s is None else max(0.0, due_s - time.monotonic())

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        self._num_signals += 1
        if self._num_signals > 1:
            self._end_process(STOP_CODES[signal.Signals(number)])
        if not self.is_requested:  # else limits.max_seconds was first: its flush goes on
            self._request(STOP_CODES[signal.Signals(number)], f"received {name}")

    def _request(self, code: int, reason: str) -> None:
        with self._lock:
            self.code, self.reason = code, reason
            self._requested_s = time.monotonic()
            is_admitting = self._is_admitting
        self.on_request()
        if not is_admitting:
            self._abandon(f"{reason} before the first row was admitted")

    def _abandon(self, reason: str) -> None:
        # In a thread of its own: giving the lease back may hang as well.
        helper = threading.Thread(target=self._last_words, args=(reason,), daemon=True)
        helper.start()
        helper.join(_LAST_WORDS_S)
        self._end_process(self.code)

    def _last_words(self, reason: str) -> None:
        with contextlib.suppress(Exception):  # the process ends whatever happens here
            self.on_abandon(self.code, reason)
