"""What an engine is besides if fewer sequences may run in it than it was built for.

Must not know: how many are best.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from batchinfer.engine.base import Engine


@runtime_checkable
class NarrowableEngine(Engine, Protocol):
    """An engine that can be told, between steps, how many sequences run at once."""

    def set_width(self, width: int) -> bool:
        """Begin no more while so many run, at most `facts.max_num_seqs`; those that run go on.

        Changes no result. False: this one cannot, and runs all that it is given.
        """
