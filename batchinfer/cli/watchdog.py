"""The watchdog of a process: turns signals and a deadline into a stop, and sees that it is obeyed.

The C-level signal handler writes to a pipe even while the main thread is inside C code (a model
load, an upload); a thread reads it. Before the first admitted row there is nothing to flush: it
ends the process immediately. Later it asks for a stop, and ends the process itself when the main
thread has not done so in time. A second signal ends it immediately. Must not know: what is being
stopped. Invariant: a run never continues without somebody who obeys a stop.
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

from batchinfer.runner import Stop
from batchinfer.signals import STOP_CODES, handled_signals, release_signals

logger = logging.getLogger("batchinfer.runner")

#: From the first signal to the end of the process, at most (schedulers send SIGKILL after 30 s or
#: more).
GRACE_S = 18.0
_LAST_WORDS_S = 1.5
#: Signals closer together are one: `timeout` and systemd send two to notify a process once.
_TOGETHER_S = 0.25
#: A deadline may be further away than a system call can wait.
_MAX_WAIT_S = 3600.0

#: (exit code, reason)
LastWords = Callable[[int, str], None]


def end_process(code: int, reason: str) -> None:
    """End immediately, whatever hangs."""
    os._exit(code)


class Watchdog:
    """One per process: it owns the process's signals."""

    def __init__(
        self,
        stop: Stop,
        *,
        last_words: LastWords = lambda code, reason: None,
        end: LastWords = end_process,
        grace_s: float = GRACE_S,
    ) -> None:
        """`last_words`: said before the process ends, for a moment at most. `end` must not return
        while the process lives.
        """
        self._stop = stop
        self._say_last_words = last_words
        self._end = end
        self._grace_s = grace_s
        self._first_signal_s: float | None = None
        self._has_seen_stop = False
        self._pipe: tuple[int, int] | None = None
        self._left: frozenset[int] = frozenset()

    def leave(self, number: signal.Signals, handler: Callable[[], None]) -> None:
        """From now on a signal calls `handler` instead. Call in the main thread."""
        self._left |= {number}
        signal.signal(number, lambda *_: handler())

    def set_max_seconds(self, max_seconds: float | None) -> None:
        """`limits.max_seconds`, counted from the making of the stop."""
        self._stop.set_max_seconds(max_seconds)
        assert self._pipe is not None
        os.write(self._pipe[1], b"\0")  # the thread waits without it

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
            self._stop.request(1, f"internal error: the watchdog failed: {error}")
            self._obey_first()
            time.sleep(self._grace_s)
            self._abandon(self._stop.reason)

    def _wait_and_obey(self) -> None:
        assert self._pipe is not None
        due_s = self._due_s()
        wait_s = None if due_s is None else min(max(0.0, due_s - time.monotonic()), _MAX_WAIT_S)
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(self._pipe[0], select.POLLIN)
        if poll.poll(None if wait_s is None else wait_s * 1000):
            for number in os.read(self._pipe[0], 64):
                if number in STOP_CODES and number not in self._left:
                    self._on_signal(signal.Signals(number))
        elif self._has_seen_stop and due_s is not None and time.monotonic() >= due_s:
            reason = f"{self._stop.reason}; the flush did not end within {self._grace_s:g} s"
            self._abandon(reason)
        self._obey_first()

    def _due_s(self) -> float | None:
        if self._has_seen_stop and self._stop.requested_s is not None:
            return self._stop.requested_s + self._grace_s
        return self._stop.deadline_s

    def _on_signal(self, number: signal.Signals) -> None:
        now_s = time.monotonic()
        if self._first_signal_s is None:
            self._first_signal_s = now_s
            # If limits.max_seconds was first, its flush continues.
            self._stop.request(STOP_CODES[number], f"received {number.name}")
        elif number is signal.SIGXCPU:  # the kernel repeats it every second
            return
        elif now_s > self._first_signal_s + _TOGETHER_S:
            begun = (
                f"{self._stop.reason}, then {number.name}: ended immediately; what was not durable "
            )
            self._end(STOP_CODES[number], f"{begun}yet is computed again by the next start")

    def _obey_first(self) -> None:
        """A stop that is new: where no row was admitted there is nothing to wait for."""
        if self._has_seen_stop or not self._stop.is_requested:
            return
        self._has_seen_stop = True
        if not self._stop.was_admitting:
            self._abandon(f"{self._stop.reason} before the first row was admitted")

    def _abandon(self, reason: str) -> None:
        # In a thread of its own: giving the lease back may hang as well.
        helper = threading.Thread(target=self._last_words, args=(reason,), daemon=True)
        helper.start()
        helper.join(_LAST_WORDS_S)
        self._end(self._stop.code, reason)

    def _last_words(self, reason: str) -> None:
        with contextlib.suppress(Exception):  # the process ends whatever happens here
            self._say_last_words(self._stop.code, reason)
