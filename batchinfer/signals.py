"""The signals that stop a process, before anything is there that could obey them.

Must not know: what is stopped. Imported before everything that takes time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Signals by which terminals, people and schedulers end a process or warn of its end, with the exit
#: code of a run that obeyed. Timers (SIGALRM and its kin) are not among them: libraries use those.
STOP_CODES: Final = {
    signal.SIGHUP: 129,
    signal.SIGINT: 130,
    signal.SIGQUIT: 131,
    signal.SIGUSR2: 140,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 143,
    signal.SIGXCPU: 152,
}

_PR_SET_PDEATHSIG = 1


def end_with(parent_pid: int) -> None:
    """Let the kernel end this process as soon as the thread that started it has ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def handled_signals() -> list[signal.Signals]:
    """Those that stop this process: who started it ignoring one (nohup, `trap ''`) meant it."""
    return [number for number in STOP_CODES if signal.getsignal(number) is not signal.SIG_IGN]


def hold_signals() -> None:
    """Let signals wait, until `release_signals`. Threads started meanwhile never receive them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_CODES)


def release_signals() -> None:
    """Deliver what was held to the handlers that are there now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_CODES)


def ignore_stops() -> None:
    """For a process whose parent is told, and tells; processes below it keep the default."""
    for number in STOP_CODES:
        signal.signal(number, lambda *_: None)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Undo what a library does meanwhile to the handlers of these signals; in the main thread, as
    no other can change them.
    """
    before = {number: signal.getsignal(number) for number in STOP_CODES}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
