"""Which pieces of a shard joined runs have, and which they have brought to their end.

Names only: what is in the store below `pieces/`. A lease is created once and names a member; the
highest number holds the piece, and taking over is creating the next number. Must not know: who is
gone, what a piece is made of. Leases save work: what is done, parts and finished files say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchinfer.ledger.layout import PIECES_PREFIX, pieces_prefix, split_pieces_key
from batchinfer.ledger.members import Member
from batchinfer.storage import Store

#: The name of what is not rows: the right to fold the shard's parts.
FOLD = "fold"
_LEASE = re.compile(r"(fold|\d{10,}-\d{10,})-(\d{6,})\.lease", re.ASCII)
_ENDED = re.compile(r"(\d{10,}-\d{10,})-(\d+)\.ended", re.ASCII)


def name_of(rows: range) -> str:
    """The piece of these rows of a shard."""
    return f"{rows.start:010d}-{rows.stop:010d}"


@dataclass(frozen=True, slots=True)
class Taken:
    """A lease as listed. `version`: as of a stored file."""

    number: int
    version: str


@dataclass(frozen=True, slots=True)
class ShardLeases:
    """What one listing shows of a shard. By name of piece."""

    taken: dict[str, Taken] = field(default_factory=dict)  # the one of the highest number
    ended: dict[str, int] = field(default_factory=dict)  # results that it must have, and has


class PieceLeases:
    """Those of one output, for one member. Its methods may be called from several threads."""

    def __init__(self, store: Store, member: Member) -> None:
        self._store = store
        self._member = member
        self._holders: dict[tuple[str, str], Member] = {}  # by key and version

    def look(self, shard: str | None = None) -> dict[str, ShardLeases]:
        """By shard, those with any; or of one shard."""
        found: dict[str, ShardLeases] = {}
        prefix = PIECES_PREFIX if shard is None else pieces_prefix(shard)
        for info in self._store.list(prefix, recursive=shard is None):
            name_of_shard, name = split_pieces_key(info.key)
            leases = found.setdefault(name_of_shard, ShardLeases())
            if match := _LEASE.fullmatch(name):
                before = leases.taken.get(match[1])
                if before is None or before.number < int(match[2]):
                    leases.taken[match[1]] = Taken(int(match[2]), info.version)
            elif match := _ENDED.fullmatch(name):
                leases.ended[match[1]] = int(match[2])
        return found

    def take(self, shard: str, name: str, number: int) -> bool:
        """Create the lease of that number; False: somebody else has."""
        member = self._member
        content = json.dumps({"member": member.number, "token": member.token}).encode()
        return self._store.create(_lease_key(shard, name, number), content)

    def holder(self, shard: str, name: str, taken: Taken) -> Member | None:
        """Whom the lease names; None: it is gone, or damaged."""
        key = _lease_key(shard, name, taken.number)
        known = self._holders.get((key, taken.version))
        if known is None:
            try:
                record = json.loads(self._store.read(key))
                known = Member(int(record["member"]), str(record["token"]))
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                return None
            self._holders[key, taken.version] = known
        return known

    def end(self, shard: str, name: str, num_expected: int) -> None:
        """All results of the piece are durable."""
        self._store.create(f"{pieces_prefix(shard)}{name}-{num_expected}.ended", b"{}\n")

    def drop(self, shard: str, name: str, number: int) -> None:
        """Give back a lease that was not needed."""
        self._store.delete([_lease_key(shard, name, number)])

    def forget(self, shards: Iterable[str]) -> None:
        """Delete all of these shards': they are finished, or parts are to be looked at again."""
        for shard in shards:
            listed = self._store.list(pieces_prefix(shard), recursive=False)
            self._store.delete([info.key for info in listed])


def clear_pieces(store: Store) -> None:
    """Delete all leases on pieces: no joined run is at work, or every shard is finished."""
    store.delete([info.key for info in store.list(PIECES_PREFIX)])


def _lease_key(shard: str, name: str, number: int) -> str:
    return f"{pieces_prefix(shard)}{name}-{number:06d}.lease"
