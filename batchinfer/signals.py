"""The signals that stop a process, before anything is there that could obey them.

Must not know: what is stopped. Imported before everything that takes time.
"""

from __future__ import annotations

import signal
from typing import Final

#: Exit codes, by the signal that was received first.
STOP_CODES: Final = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


def hold_signals() -> None:
    """Let signals wait, until `release_signals`. Threads started meanwhile never receive them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_CODES)


def release_signals() -> None:
    """Deliver what was held to the handlers that are there now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_CODES)
