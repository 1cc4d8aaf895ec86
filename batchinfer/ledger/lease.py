"""One live run on an output (or on one slice of it). Saves work; correctness rests on the four
rules.

Local: `flock`. Elsewhere numbered objects `<name>-000007.json`: the highest number holds the lease;
taking over is creating the next number, which one contender wins. Each object has one writer, its
holder. Must not know: what the lease protects.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from batchinfer.errors import LeaseHeld
from batchinfer.ledger.holder import Holder, lost, refusal, refusal_of_joined
from batchinfer.ledger.layout import LEASES_PREFIX
from batchinfer.ledger.lease_local import acquire_local, count_of
from batchinfer.storage import Store

WHOLE = "all"
#: Of joined runs, any number of which may have it: see `members.acquire_joint`.
JOINT = "join"
#: How long another host's holder is watched for a sign of life before its lease is taken over.
WATCH_S = 30.0
_POLL_S = 2.0
_CHECK_S = 1.0
_MEMBER_NAME = re.compile(r"join-(\d{6,})\.json")
_OBJECT_NAME = re.compile(r"(all|\d+-of-\d+)-(\d{6,})\.json")


class Proof(Protocol):
    """A lease as seen from a process that does not hold it. Can be pickled."""

    def open(self, store: Store) -> Lease:
        """To be checked; giving back and beating are the holder's, and do nothing."""


class Lease(Protocol):
    def beat(self) -> None:
        """Show life; call every 10 s. Raises LeaseHeld if somebody else took over, LeaseLost."""

    def check(self) -> None:
        """Raise LeaseLost if the lease is gone, LeaseHeld if somebody else took over.

        Cheap enough for each write of a result: a request a second at most.
        """

    def proof(self) -> Proof:
        """What other processes that write under this lease check it by."""

    def release(self) -> None:
        """Give the lease back. Idempotent."""

    def undo(self) -> None:
        """Give back a lease under which nothing was written; a local output is as it was."""


def acquire_lease(
    store: Store,
    name: str,
    holder: Holder,
    *,
    single_writer: bool = False,
    watch_s: float = WATCH_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Take the lease `name`: "all", or "<i>-of-<n>" which excludes itself, "all" and slices of
    another n.

    Raises LeaseHeld, naming the holder, if a live run is in the way. `single_writer`: promised, so
    a file system without locks will do.
    """
    if store.is_local:
        folder = Path(store.url) / LEASES_PREFIX
        return acquire_local(
            folder, name, holder, whole=WHOLE, joint=JOINT, single_writer=single_writer
        )
    return _acquire_object(store, name, holder, watch_s, sleep)


class _ObjectLease:
    def __init__(self, store: Store, name: str, number: int, holder: Holder) -> None:
        self._store = store
        self._name = name
        self._number = number
        self._holder = holder
        self._counter = 0
        self._is_released = False
        self._is_lost = False
        self._seen_s = time.monotonic()  # when our object was last seen or written
        self._lock = threading.Lock()  # a beat in flight must not overwrite the release

    @property
    def key(self) -> str:
        return _lease_key(self._name, self._number)

    def record(self) -> bytes:
        record = asdict(self._holder)
        record |= {"counter": self._counter, "released": self._is_released}
        return json.dumps(record).encode()

    def create(self) -> bool:
        return self._store.create(self.key, self.record())

    def proof(self) -> Proof:
        return _ObjectProof(self._name, self._number, self._holder)

    def beat(self) -> None:
        if self._is_released:
            return
        self._refuse_newer()
        self._look()  # written again it would be all that is at the place of a deleted output
        with self._lock:
            if not self._is_released:
                self._counter += 1
                self._store.put(self.key, self.record())

    def check(self) -> None:
        """Look whether the object is still there and ours, unless that was seen a moment ago."""
        if not self._is_released and time.monotonic() - self._seen_s >= _CHECK_S:
            self._look()

    def _look(self) -> None:
        found = read_lease(self._store, self._name, self._number)
        if found is None or found[0] is None or found[0].token != self._holder.token:
            self._is_lost = True
            self._refuse_newer()  # who took over deletes older objects
            raise lost(self._store.url)
        self._seen_s = time.monotonic()

    def _refuse_newer(self) -> None:
        newest = newest_leases(self._store).get(self._name, 0)
        if newest > self._number:
            self._is_lost = True
            other = read_lease(self._store, self._name, newest)
            raise refusal(self._store.url, other[0] if other else None)

    def release(self) -> None:
        with self._lock:
            if not self._is_released and not self._is_lost:
                self._is_released = True
                self._store.put(self.key, self.record())

    def undo(self) -> None:
        self.release()  # whoever counts on from its number must find it

    def forget_older(self) -> None:
        self._store.delete(
            [_lease_key(self._name, n) for n in range(max(1, self._number - 3), self._number)]
        )


@dataclass(frozen=True, slots=True)
class _ObjectProof:
    name: str
    number: int
    holder: Holder

    def open(self, store: Store) -> Lease:
        return _SeenLease(_ObjectLease(store, self.name, self.number, self.holder))


class _SeenLease:
    def __init__(self, lease: _ObjectLease) -> None:
        self._lease = lease

    def beat(self) -> None: ...

    def check(self) -> None:
        self._lease.check()

    def proof(self) -> Proof:
        return self._lease.proof()

    def release(self) -> None: ...

    def undo(self) -> None: ...


def _lease_key(name: str, number: int) -> str:
    return f"{LEASES_PREFIX}{name}-{number:06d}.json"


def newest_leases(store: Store) -> dict[str, int]:
    """The highest number of each lease but those of joined runs."""
    newest: dict[str, int] = {}
    for info in store.list(LEASES_PREFIX):
        if match := _OBJECT_NAME.fullmatch(info.key.rsplit("/", 1)[-1]):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    return newest


def read_lease(store: Store, name: str, number: int) -> tuple[Holder | None, int, bool] | None:
    """(holder, counter, released); None if the object is gone, no holder if it is damaged."""
    try:
        record = json.loads(store.read(_lease_key(name, number)))
    except FileNotFoundError:
        return None
    except ValueError:
        record = {}
    if not isinstance(record, dict):
        record = {}
    counter, is_released = record.pop("counter", 0), record.pop("released", False)
    return Holder.from_record(record), counter, is_released


def _acquire_object(
    store: Store, name: str, holder: Holder, watch_s: float, sleep: Callable[[float], None]
) -> Lease:
    while True:
        newest = newest_leases(store)
        number = newest.get(name, 0)
        if number:
            refuse_if_alive(store, name, number, watch_s, sleep)
        lease = _ObjectLease(store, name, number + 1, holder)
        if lease.create():
            break  # else somebody was faster: look at the new holder

    def sleep_alive(seconds: float) -> None:
        lease.beat()  # else whoever watches us meanwhile takes us for dead
        sleep(seconds)

    try:
        # After our own is visible: of two runs that exclude each other at least one sees the other.
        for other, number in newest_leases(store).items():
            if other == name:
                continue
            if WHOLE in (other, name) or count_of(other) != count_of(name):
                refuse_if_alive(store, other, number, watch_s, sleep_alive)
        _refuse_joined(store, watch_s, sleep_alive)
    except LeaseHeld:
        lease.release()
        raise
    lease.forget_older()
    return lease


def refuse_if_alive(
    store: Store, name: str, number: int, watch_s: float, sleep: Callable[[float], None]
) -> None:
    """Return if the holder is dead or has released; raise LeaseHeld if it lives."""
    first = read_lease(store, name, number)
    waited_s = 0.0
    while first is not None and not first[2]:
        holder, counter, _ = first
        is_dead = holder.is_dead_here() if holder else None
        if is_dead is not None:
            if is_dead:
                return
            raise refusal(store.url, holder)
        if waited_s >= watch_s:
            return
        sleep(_POLL_S)
        waited_s += _POLL_S
        now = read_lease(store, name, number)
        if now is None:
            return
        if now[1] != counter and not now[2]:
            raise refusal(store.url, now[0])
        first = now


def joined_versions(store: Store) -> Iterator[tuple[int, str]]:
    """Numbers of joined runs, the dead ones too, with the versions of their objects."""
    for info in store.list(LEASES_PREFIX + JOINT):
        if match := _MEMBER_NAME.fullmatch(info.key.rsplit("/", 1)[-1]):
            yield int(match[1]), info.version


def joined_numbers(store: Store) -> list[int]:
    return [number for number, _ in joined_versions(store)]


def _refuse_joined(store: Store, watch_s: float, sleep: Callable[[float], None]) -> None:
    """Raise LeaseHeld if a joined run lives. All of them are watched together."""
    watched: dict[int, int] = {}  # by number: the counter
    for number in joined_numbers(store):
        found = read_lease(store, JOINT, number)
        if found is None or found[2]:
            continue
        is_dead = found[0].is_dead_here() if found[0] else None
        if is_dead is False:
            raise refusal_of_joined(store.url, found[0])
        if is_dead is None:
            watched[number] = found[1]
    waited_s = 0.0
    while watched and waited_s < watch_s:
        sleep(_POLL_S)
        waited_s += _POLL_S
        for number, counter in list(watched.items()):
            now = read_lease(store, JOINT, number)
            if now is None or now[2]:
                del watched[number]
            elif now[1] != counter:
                raise refusal_of_joined(store.url, now[0])
