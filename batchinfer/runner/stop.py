"""Requests to stop: signals, `limits.max_seconds`; and the watchdog that sees to it that they are
obeyed.

The C-level signal handler writes to a pipe even while the main thread is inside C code (a model
load, an upload); a thread reads it. Before the first admitted row there is nothing to flush: it
ends the process at once. Later it sets `is_requested`, and ends the process itself when the main
thread has not done so in time. A second signal ends it at once. Must not know: what is being
stopped. Invariant: a run never goes on without somebody who obeys a stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable

from batchinfer.signals import STOP_CODES, handled_signals, release_signals

logger = logging.getLogger("batchinfer.runner")

#: From the first signal to the end of the process, at most (schedulers send SIGKILL after 30 s or
#: more).
GRACE_S = 18.0
_LAST_WORDS_S = 1.5
#: Within it, storage may go on retrying for so long; then a failing write is given up.
RETRY_GRACE_S = 10.0
#: Signals closer together are one: `timeout` and systemd send two to tell a process once.
_TOGETHER_S = 0.25
#: A deadline may be further away than a system call can wait.
_MAX_WAIT_S = 3600.0


class StopControl:
    """Knows whether to stop, why, and with which exit code. One per process."""

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        self._started_s = time.monotonic()
        self._deadline_s: float | None = None
        self._grace_s = grace_s
        self._requested_s: float | None = None
        self._first_signal_s: float | None = None
        self._is_admitting = False
        self._is_giving_up = False
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        #: Called before the watchdog ends the process, for a moment at most: (exit code, reason).
        self.on_abandon: Callable[[int, str], None] = lambda code, reason: None
        #: Ends the process, at once and whatever hangs in it: (exit code, reason).
        self.end_process: Callable[[int, str], None] = lambda code, reason: os._exit(code)
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
        for number in handled_signals():
            signal.signal(number, lambda *_: None)  # the work is done by the watchdog's thread
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        release_signals()

    def _watch(self) -> None:
        try:
            while True:
                self._wait_and_obey()
        except Exception as error:  # the thread's edge: nobody would obey the next signal
            logger.critical("this is a bug in batchinfer; please report it", exc_info=True)
            self._request(1, f"internal error: the watchdog failed: {error}")
            time.sleep(self._grace_s)
            self._abandon(self.reason)

    def _wait_and_obey(self) -> None:
        assert self._pipe is not None
        due_s = self._due_s()
        wait_s = None if due_s is None else min(max(0.0, due_s - time.monotonic()), _MAX_WAIT_S)
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(self._pipe[0], select.POLLIN)
        if poll.poll(None if wait_s is None else wait_s * 1000):
            for number in os.read(self._pipe[0], 64):
                if number in STOP_CODES:
                    self._on_signal(signal.Signals(number))
        elif due_s is None or time.monotonic() < due_s:
            return
        elif self.is_requested:
            self._abandon(f"{self.reason}; the flush did not end within {self._grace_s:g} s")
        else:
            self._request(75, "limits.max_seconds is over")

    def _due_s(self) -> float | None:
        if self._requested_s is not None:
            return self._requested_s + self._grace_s
        return self._deadline_s

    def _on_signal(self, number: signal.Signals) -> None:
        now_s = time.monotonic()
        if self._first_signal_s is None:
            self._first_signal_s = now_s
            if not self.is_requested:  # else limits.max_seconds was first: its flush goes on
                self._request(STOP_CODES[number], f"received {number.name}")
        elif number is signal.SIGXCPU:  # the kernel repeats it every second
            return
        elif now_s > self._first_signal_s + _TOGETHER_S:
            reason = f"{self.reason}, then {number.name}: ended at once; what was not durable yet "
            self.end_process(STOP_CODES[number], f"{reason}is computed again by the next start")

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
        self.end_process(self.code, reason)

    def _last_words(self, reason: str) -> None:
        with contextlib.suppress(Exception):  # the process ends whatever happens here
            self.on_abandon(self.code, reason)
