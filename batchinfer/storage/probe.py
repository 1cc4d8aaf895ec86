"""Whether a store does what its contract says, tried out with one file.

Must not know: who asks. Invariant: nothing that was not there before stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchinfer.errors import BatchInferError
from batchinfer.storage.base import Store

_CONTENT = b"doctor"


def problem_of(store: Store, key: str) -> str | None:
    """Write `key`, read it back, list and delete it; then whether create-if-absent can be relied
    on. What does not work, in words; None: all of it does. Raises what the store raises.
    """
    with _traceless(store, key):
        store.put(key, _CONTENT)
        is_same = store.read(key) == _CONTENT
        is_listed = any(info.key == key for info in store.list(key))
        store.delete([key])
        has_create = store.supports_create(key)
    if not (is_same and is_listed):
        return "does not give back what was written"
    return None if has_create else "no conditional create; needs output.single_writer: true"


@contextmanager
def _traceless(store: Store, key: str) -> Iterator[None]:
    """A check leaves no file, and of a file system's folders none that it made on the way there:
    a mistyped URL would be a folder from then on, and the next check would find it writable.
    """
    above = Path(store.url_of(key)).parents if store.is_local else ()
    missing = [folder for folder in above if not os.path.lexists(folder)]
    try:
        yield
    except BatchInferError:
        with suppress(BatchInferError):  # what failed first is reported
            store.delete([key])
        raise
    finally:
        for folder in missing:  # deepest first
            with suppress(OSError):  # not made, or somebody else has put something there
                folder.rmdir()
