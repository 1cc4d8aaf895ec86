"""Settings of a whole process that make a start faster and its memory smaller.

They reach everything in the process, so a run does not own them: the process that is there for one
run (`batchinfer run`) switches them on with `WholeProcess`, a program of somebody else's does not.
Must not know: who holds memory, what a run does between the calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_ARENA_MAX = -8  # of glibc's malloc.h
_MAX_ARENAS = 4


class Tuning:
    """The moments of a run at which a process may be tuned. This one leaves it alone."""

    def begin(self) -> None:
        """Before the run's threads start."""

    def importing(self) -> None:
        """Before the tokenizer and the engine are imported."""

    def waiting(self) -> None:
        """The imports are over, and no row to compute has been found yet."""

    def imported(self) -> None:
        """Before the model is loaded; also where none will be."""

    def freed(self) -> None:
        """Much memory was given back that nobody needs soon."""


class WholeProcess(Tuning):
    """For a process that does nothing else."""

    def begin(self) -> None:
        """Few heaps for all threads: each keeps what its busiest moment took.

        A run's threads each free much at other times than they take it, and an allocator keeps it
        for each: four heaps instead of sixteen (glibc: 8 a core) took 15 MB off 260 thousand rows.
        """
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, _MAX_ARENAS)

    def importing(self) -> None:
        """No collection until the engine is imported: it looks at a million objects, frees few."""
        gc.disable()

    def waiting(self) -> None:
        gc.enable()  # a long look for the first row to compute

    def imported(self) -> None:
        """Modules stay: vLLM collects garbage five times before its first step."""
        gc.freeze()
        gc.enable()

    def freed(self) -> None:
        """Give back whole free pages in the middle of the heaps too. Takes some milliseconds."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
