"""Shortages of memory, threads or file descriptors: reasons to try again, not bugs of ours.

Must not know: what was being done. Used at the edge of a run, for what no room foresaw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from batchinfer.errors import TransientError
from batchinfer.limits import limit_met, thread_limit
from batchinfer.storage.local_errors import os_errors

#: What a run keeps of it, and how it could take less.
_OF_RUN = (
    "Finished rows are durable. ",
    ", or lower packing.buffer_tokens and packing.window_rows,",
)


@contextmanager
def shortages(*, is_run: bool = True) -> Iterator[None]:
    """`is_run` False: what runs out of it computes no rows."""
    kept, less = _OF_RUN if is_run else ("", "")
    try:
        yield
    except MemoryError as error:
        more = limit_met() or "Give the process more"
        raise TransientError(
            f"out of memory ({error or 'no more is available'}). {kept}{more}{less} and start again"
        ) from error
    except RuntimeError as error:
        if "can't start new thread" not in str(error):  # CPython's words; it has no class for it
            raise
        raise TransientError(
            f"no more threads can be started: {thread_limit()}, and start again"
        ) from error
    except OSError as error:
        with os_errors("use", str(error.filename or "a file")):
            raise
