"""Files of an output's folder where a folder is needed, and the other way round.

Somebody copied, moved or made them. They are looked for before anything is computed: a run would
meet the place of its parts after minutes, that of a finished file or `_SUCCESS` after days. A
bucket has no folders. Invariant: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from batchinfer.errors import ConfigError
from batchinfer.ledger import layout
from batchinfer.source import Shard, in_print
from batchinfer.storage import Other, Store

#: Whose files are named by runs.
_OF_RUNS = (layout.RUNS_PREFIX, layout.STATUS_PREFIX, layout.LOGS_PREFIX)
_FOLDERS = frozenset(
    prefix.rstrip("/")
    for prefix in (
        *(f"{layout.META}/", *_OF_RUNS),
        *(layout.LEASES_PREFIX, layout.PARTS_PREFIX, layout.UNREADABLE_PREFIX),
    )
)
_RECORDS = frozenset({layout.SUCCESS_KEY, layout.JOB_KEY, layout.RESTART_KEY})


def check_records(store: Store) -> None:
    """Before any record is read: reading a pipe waits forever. Raises ConfigError."""
    if store.is_local:
        prefixes = ("", f"{layout.META}/", layout.LEASES_PREFIX, *_OF_RUNS)
        _check(store, prefixes, _FOLDERS, _is_record)


def check_results(store: Store, shards: Sequence[Shard]) -> None:
    """The places of parts and finished files. Raises ConfigError."""
    if store.is_local:
        names = frozenset(shard.name for shard in shards)
        of_parts = (layout.parts_prefix(name).rstrip("/") for name in names)
        folders = frozenset(_with_parents(of_parts)) | frozenset(_parents(names))
        prefixes = sorted({"", *(f"{folder}/" for folder in _parents((*names, *folders)))})
        _check(store, prefixes, folders, names.__contains__)


def _check(
    store: Store, prefixes: Iterable[str], folders: frozenset[str], is_file: Callable[[str], bool]
) -> None:
    """List the folders of `prefixes`, those above first."""
    others: dict[str, Other] = {}
    for prefix in prefixes:
        listed = store.list(prefix, recursive=False, on_other=others.__setitem__)
        for key in (info.key for info in listed):
            if key in folders:
                _refuse(store, key, "a file", "a folder")
        for key, other in others.items():
            if key in folders and other is not Other.FOLDER:
                _refuse(store, key, other.value, "a folder")
            if is_file(key) and other is not Other.DEAD_LINK:  # a file takes the place of a link
                _refuse(store, key, other.value, "a file")
        others.clear()


def _refuse(store: Store, key: str, found: str, needed: str) -> None:
    raise ConfigError(
        f"{in_print(store.url_of(key))} is {found} where {needed} is needed: remove or move it"
    )


def _is_record(key: str) -> bool:
    is_of_run = key.startswith(_OF_RUNS) and layout.run_of_key(key) is not None
    is_lock = key.startswith(layout.LEASES_PREFIX) and key.endswith(".lock")
    return key in _RECORDS or is_of_run or is_lock


def _parents(keys: Iterable[str]) -> set[str]:
    """Every folder above each key."""
    found: set[str] = set()
    for key in keys:
        folder = key.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


def _with_parents(keys: Iterable[str]) -> set[str]:
    own = set(keys)
    return own | _parents(own)
