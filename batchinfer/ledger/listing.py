"""One listing of an output: which shards are finished, which have begun.

Must not know: what the files hold. Reads only.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.ledger.layout import (
    JOINED_PREFIX,
    LEASES_PREFIX,
    LOGS_PREFIX,
    META,
    PARTS_PREFIX,
    PIECES_PREFIX,
    RUNS_PREFIX,
    STATUS_PREFIX,
    parse_part_key,
    run_of_key,
)
from batchinfer.storage import Store


@dataclass(frozen=True, slots=True)
class Survey:
    """What one listing of an output shows.

    `nested`: folders below it that are outputs of their own; their files are in no other set.
    `last_run`: the highest run number that anything is named by.
    """

    finished: frozenset[str] = frozenset()  # shards with a finished file
    with_parts: frozenset[str] = frozenset()  # shards
    nested: frozenset[str] = frozenset()
    last_run: int = 0
    has_joined: bool = False  # leases of joined runs, living or not

    @property
    def has_results(self) -> bool:
        return bool(self.finished or self.with_parts)


def survey(store: Store) -> Survey:
    """List the output once. Memory: a name for each shard, nothing for each part."""
    finished: set[str] = set()
    with_parts: set[str] = set()
    nested: set[str] = set()
    last_run = 0
    has_joined = False
    for info in store.list():
        if info.key.startswith(PARTS_PREFIX):
            if (parsed := parse_part_key(info.key)) is not None:
                with_parts.add(parsed[0])
                last_run = max(last_run, parsed[1].run)
        elif info.key.startswith((RUNS_PREFIX, STATUS_PREFIX, LOGS_PREFIX)):
            last_run = max(last_run, run_of_key(info.key) or 0)
        elif info.key.startswith(f"{META}/"):
            has_joined |= info.key.startswith((PIECES_PREFIX, JOINED_PREFIX))
        elif f"/{META}/" in info.key:
            folder, _, rest = info.key.partition(f"/{META}/")
            if not f"{META}/{rest}".startswith(LEASES_PREFIX):  # a refused start leaves those
                nested.add(folder)
        elif info.key.endswith(".parquet"):
            finished.add(info.key)
    of_others = tuple(f"{folder}/" for folder in nested)
    return Survey(
        finished=frozenset(key for key in finished if not key.startswith(of_others)),
        with_parts=frozenset(with_parts),
        nested=frozenset(nested),
        last_run=last_run,
        has_joined=has_joined,
    )
