"""Joined runs: each shows that it lives by an object of its own, and sees that others are gone.

A member's object is created once, has one writer, and is deleted at the member's end. Must not
know: what members work on. Invariant: no two machines' clocks are compared; a member is gone where
its object is gone or another's, where its process is known to have ended, or after its object was
seen unchanged for `STALE_S` by the observer's own clock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from batchinfer.errors import LeaseHeld, LeaseLost
from batchinfer.ledger.holder import Holder
from batchinfer.ledger.layout import LEASES_PREFIX, member_key
from batchinfer.ledger.lease import (
    JOINT,
    WATCH_S,
    WHOLE,
    joined_numbers,
    joined_versions,
    newest_leases,
    read_lease,
    refuse_if_alive,
)
from batchinfer.ledger.lease_local import LocalLease, LocalProof, acquire_local
from batchinfer.storage import Store

#: A member whose object nobody has seen change for so long is gone. Six beats, since what a file
#: system of the network says of a file may be seconds old.
STALE_S = 60.0
_CHECK_S = 1.0


def boot_time() -> float:
    """Seconds of this machine's own clock, which counts on while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Member:
    """A joined run, as leases on pieces name it. A number may come again, a token does not."""

    number: int
    token: str


def acquire_joint(
    store: Store,
    holder: Holder,
    *,
    watch_s: float = WATCH_S,
    sleep: Callable[[float], None] = time.sleep,
) -> MemberLease:
    """Become a member. Raises LeaseHeld, naming the holder, if a run on the whole input or on a
    slice is in the way.
    """
    locks: LocalLease | None = None
    if store.is_local:
        folder = Path(store.url) / LEASES_PREFIX
        locks = acquire_local(folder, JOINT, holder, whole=WHOLE, joint=JOINT, single_writer=False)
    try:
        lease = _create(store, holder, locks)
    except BaseException:
        if locks is not None:
            locks.undo()
        raise
    if locks is None:
        _refuse_others(store, lease, watch_s, sleep)
    return lease


def _create(store: Store, holder: Holder, locks: LocalLease | None) -> MemberLease:
    while True:
        number = max(joined_numbers(store), default=0) + 1
        lease = MemberLease(store, number, holder, locks)
        if lease.create():
            return lease


def _refuse_others(
    store: Store, lease: MemberLease, watch_s: float, sleep: Callable[[float], None]
) -> None:
    """After our own object is visible: of two that exclude each other one sees the other."""

    def sleep_alive(seconds: float) -> None:
        lease.beat()
        sleep(seconds)

    try:
        for name, number in newest_leases(store).items():
            refuse_if_alive(store, name, number, watch_s, sleep_alive)
    except LeaseHeld:
        lease.release()
        raise


class MemberLease:
    """A `Lease`, shared with the other members."""

    def __init__(self, store: Store, number: int, holder: Holder, locks: LocalLease | None) -> None:
        self._store = store
        self._holder = holder
        self._locks = locks
        self.member = Member(number, holder.token)
        self._key = member_key(number)
        self._counter = 0
        self._is_released = False
        self._seen_s = time.monotonic()
        self._shown_s = boot_time()  # before the last write of our object
        self.num_lapses = 0  # times that others may have taken us for gone
        self._lock = threading.Lock()  # a beat in flight must not come after the release

    def create(self) -> bool:
        return self._store.create(self._key, self._record())

    def _record(self) -> bytes:
        record = asdict(self._holder) | {"counter": self._counter, "released": False}
        return json.dumps(record).encode()

    @property
    def is_fresh(self) -> bool:
        """Whether nobody can have taken us for gone since the last lapse."""
        return boot_time() - self._shown_s < STALE_S

    def beat(self) -> None:
        if self._is_released:
            return
        if self._locks is not None:
            self._locks.check()
        self._look()
        with self._lock:
            if self._is_released:
                return
            self._counter += 1
            begun_s = boot_time()
            self._store.put(self._key, self._record())
            if boot_time() - self._shown_s >= STALE_S:
                self.num_lapses += 1
            self._shown_s = begun_s

    def check(self) -> None:
        if self._locks is not None:
            self._locks.check()
        elif not self._is_released and time.monotonic() - self._seen_s >= _CHECK_S:
            self._look()

    def _look(self) -> None:
        found = read_lease(self._store, JOINT, self.member.number)
        if found is None or found[0] is None or found[0].token != self.member.token:
            if self._is_released:
                return
            raise LeaseLost(
                f"{self._store.url} was deleted or moved, or another run went on there because "
                "this one had not been heard of for long: nothing more is written there. Start "
                "again: what is missing there is computed"
            )
        self._seen_s = time.monotonic()

    def proof(self) -> MemberProof:
        locks = None if self._locks is None else self._locks.proof()
        return MemberProof(self.member.number, self._holder, locks)

    def release(self) -> None:
        """Others see at once that what we had is free."""
        self._leave()
        if self._locks is not None:
            self._locks.release()

    def undo(self) -> None:
        self._leave()
        if self._locks is not None:
            self._locks.undo()

    def _leave(self) -> None:
        with self._lock:
            is_released, self._is_released = self._is_released, True
        if not is_released:
            self._store.delete([self._key])


@dataclass(frozen=True, slots=True)
class MemberProof:
    """What the replicas of a member check it by."""

    number: int
    holder: Holder
    locks: LocalProof | None

    def open(self, store: Store) -> SeenMember:
        return SeenMember(store, self)


class SeenMember:
    """A member's lease in another process of its: to be checked, and no more."""

    def __init__(self, store: Store, proof: MemberProof) -> None:
        self._proof = proof
        self._locks = None if proof.locks is None else proof.locks.open(store)
        self._lease = MemberLease(store, proof.number, proof.holder, None)

    def beat(self) -> None: ...

    def check(self) -> None:
        if self._locks is not None:
            self._locks.check()
        else:
            self._lease.check()

    def proof(self) -> MemberProof:
        return self._proof

    def release(self) -> None: ...

    def undo(self) -> None: ...


@dataclass(slots=True)
class _Sight:
    """A member's object as it was last seen to have changed, and when."""

    version: str  # of the file
    content: tuple[str, int]  # token, counter
    holder: Holder | None
    changed_s: float
    is_gone: bool = False


class Members:
    """Who is gone, as one observer sees it. One thread looks and asks; any may read `num_alive`."""

    def __init__(self, store: Store, clock: Callable[[], float] = boot_time) -> None:
        self._store = store
        self._clock = clock
        self._seen: dict[int, _Sight] = {}
        self.num_alive = 1  # as of the last look, we among them

    def look(self) -> None:
        """See who there is, and whose object has changed."""
        listed = dict(joined_versions(self._store))
        for number in self._seen.keys() - listed.keys():
            del self._seen[number]
        for number, version in listed.items():
            sight = self._seen.get(number)
            if sight is None or sight.version != version or self._is_doubtful(sight):
                self._read(number, version)
        for sight in self._seen.values():
            sight.is_gone = self._is_silent(sight)
        self.num_alive = max(1, sum(not sight.is_gone for sight in self._seen.values()))

    def _is_doubtful(self, sight: _Sight) -> bool:
        """What a file system of the network lists of a file may be old; what is read is not."""
        return not sight.is_gone and self._clock() - sight.changed_s >= STALE_S / 2

    def _read(self, number: int, version: str) -> None:
        found = read_lease(self._store, JOINT, number)
        if found is None:
            self._seen.pop(number, None)
            return
        holder, counter, _ = found
        content = (holder.token if holder else "", counter)
        before = self._seen.get(number)
        if before is not None and before.content == content:
            before.version = version
        else:
            self._seen[number] = _Sight(version, content, holder, self._clock())

    def _is_silent(self, sight: _Sight) -> bool:
        if sight.holder is None or sight.holder.is_dead_here():
            return True
        return self._clock() - sight.changed_s >= STALE_S

    def is_gone(self, member: Member) -> bool:
        """As of the last look, or one made now: it may have come since."""
        sight = self._sight_of(member)
        if sight is None:
            self.look()
            sight = self._sight_of(member)
        return sight is None or self._is_silent(sight)

    def _sight_of(self, member: Member) -> _Sight | None:
        sight = self._seen.get(member.number)
        return sight if sight is not None and sight.content[0] == member.token else None


def clear_members(store: Store, *, is_excluded: bool) -> None:
    """Delete what members left that are gone: all, under a lease that excludes them; else those
    whose process this machine knows to have ended.
    """
    for number in joined_numbers(store):
        found = None if is_excluded else read_lease(store, JOINT, number)
        is_dead = found is not None and found[0] is not None and found[0].is_dead_here()
        if is_excluded or is_dead:
            store.delete([member_key(number)])
