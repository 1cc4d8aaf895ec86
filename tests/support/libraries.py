"""Our kernels as users have them: compiled once, by whichever test is first, and kept."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path

from batchinfer.native import compiled, user_folder


def kept_library(source: str, flags: Sequence[str]) -> Path:
    """As `compiled` into the user's folder, which is named after sources and flags.

    Another worker of the tests waits for it: it is 10 s or more of a compiler's time.
    """
    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(".kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compiled(source, flags, folder)
