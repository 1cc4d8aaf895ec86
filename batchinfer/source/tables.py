"""Folders of table formats: a log beside the files says which of them, which rows, are the table.

Read as plain Parquet, rows that were deleted or replaced come back, so such folders are refused.
Must not know: rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

from batchinfer.errors import ConfigError, InputError
from batchinfer.storage import Store

#: (folder of the log, how its files' names end, what it is the log of)
_LOGS = (
    ("_delta_log/", "", "a Delta table"),
    (".hoodie/", "", "a Hudi table"),
    ("metadata/", ".metadata.json", "an Iceberg table"),
    ("_spark_metadata/", "", "the output of a Spark stream"),
)
_MAX_LOG_KEYS = 1000
_THREADS = 16


class Tables:
    """The tables that a listing comes upon."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}  # folder, with a slash or empty -> what it is

    def see(self, key: str) -> None:
        """A listed key, whether or not it is read."""
        for log, ending, kind in _LOGS:
            index = f"/{key}".find(f"/{log}")
            if index >= 0 and key.endswith(ending):
                self._found[key[:index]] = f"{kind} ({log.rstrip('/')})"

    def refuse(self, store: Store, keys: Iterable[str]) -> None:
        """Raise InputError if a file that is read is in a table: one that was seen, or the root
        of the store or a folder above it.
        """
        if self._found:
            for key in keys:
                for folder, kind in self._found.items():
                    if key.startswith(folder):
                        raise _refusal(store.url_of(folder.rstrip("/")), kind)
        folders = [store, *store.parents()]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="tables") as pool:
            for above, kind_above in zip(folders, pool.map(_table_kind, folders), strict=True):
                if kind_above is not None:
                    raise _refusal(above.url, kind_above)


def _table_kind(folder: Store) -> str | None:
    for log, ending, kind in _LOGS:
        with suppress(ConfigError):  # no permission to look above the folder
            listed = folder.list(log, recursive=False, on_other=lambda key, what: None)
            if any(info.key.endswith(ending) for info in islice(listed, _MAX_LOG_KEYS)):
                return f"{kind} ({log.rstrip('/')})"
    return None


def _refusal(url: str, kind: str) -> InputError:
    return InputError(
        f"input.path: {url} is {kind}: its folder also has files with rows that were deleted or "
        "replaced since, and the Parquet files do not show which. Export its current version "
        "as plain Parquet, or give the files of that version one by one as input.path"
    )
