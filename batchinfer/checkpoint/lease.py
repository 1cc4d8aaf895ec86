"""One live run on an output (or on one slice of it). Saves work; correctness rests on the four
rules.

Local: `flock`. Elsewhere numbered objects `<name>-000007.json`: the highest number holds the lease;
taking over is creating the next number, which one contender wins. Each object has one writer, its
holder. Must not know: what the lease protects.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchinfer.checkpoint.layout import LEASES_PREFIX
from batchinfer.errors import LeaseHeld
from batchinfer.storage import Store
from batchinfer.storage.flock import FileLock

WHOLE = "all"
#: How long another host's holder is watched for a sign of life before its lease is taken over.
WATCH_S = 30.0
_POLL_S = 2.0
_OBJECT_NAME = re.compile(r"(all|\d+-of-\d+)-(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who runs: enough to tell, on the same machine, whether that process still lives."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_start: str  # clock ticks since boot: tells a reused pid
    since: str  # UTC, for people
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def current(cls, since: str) -> Holder:
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            boot_id=_read("/proc/sys/kernel/random/boot_id"),
            pid_namespace=_pid_namespace(),
            pid=pid,
            process_start=process_start(pid) or "",
            since=since,
        )

    def is_dead_here(self) -> bool | None:
        """True or False if this machine can tell, None if the holder runs (or ran) elsewhere."""
        here = (_read("/proc/sys/kernel/random/boot_id"), _pid_namespace())
        if (self.boot_id, self.pid_namespace) != here or not self.boot_id:
            return None
        return process_start(self.pid) != self.process_start

    def describe(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"


def process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot, None if there is none."""
    stat = _read(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] == "Z":
        return None
    return fields[19]


class Lease(Protocol):
    def beat(self) -> None:
        """Show life; call every 10 s. Raises LeaseHeld if somebody else took over."""

    def release(self) -> None:
        """Give the lease back. Idempotent."""


def acquire_lease(
    store: Store,
    name: str,
    holder: Holder,
    *,
    watch_s: float = WATCH_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Take the lease `name`: "all", or "<i>-of-<n>" which excludes itself, "all" and slices of
    another n.

    Raises LeaseHeld, naming the holder, if a live run is in the way.
    """
    if store.is_local:
        return _acquire_local(Path(store.url) / LEASES_PREFIX, name, holder)
    return _acquire_object(store, name, holder, watch_s, sleep)


def _refusal(where: str, holder: Holder | None) -> LeaseHeld:
    who = holder.describe() if holder else "its holder has not said who it is yet"
    return LeaseHeld(
        f"another run works on {where} ({who}). Wait for it or stop it; this start changed nothing"
    )


class _LocalLease:
    def __init__(self, locks: list[FileLock]) -> None:
        self._locks = locks

    def beat(self) -> None:
        """Nothing to show: the kernel knows whether we live."""

    def release(self) -> None:
        for lock in reversed(self._locks):
            lock.release()


def _acquire_local(folder: Path, name: str, holder: Holder) -> Lease:
    whole = FileLock(folder / f"{WHOLE}.lock")
    is_whole = name == WHOLE
    if not whole.acquire(shared=not is_whole):
        raise _refusal(str(folder.parent.parent), _local_holder(folder, is_whole))
    locks = [whole]
    if not is_whole:
        own = FileLock(folder / f"{name}.lock")
        if not own.acquire():
            whole.release()
            raise _refusal(f"slice {name} of {folder.parent.parent}", _read_holder(own.path))
        locks.append(own)
        if (other := _other_count(folder, name)) is not None:
            for lock in reversed(locks):
                lock.release()
            raise _refusal(f"slice {other.stem} of {folder.parent.parent}", _read_holder(other))
    locks[-1].write(json.dumps(asdict(holder)).encode())
    return _LocalLease(locks)


def _other_count(folder: Path, name: str) -> Path | None:
    """The lock of a live slice of another n: its shards and ours would overlap.

    Looked for after taking our own, so of two that start together at least one sees the other.
    """
    for path in sorted(folder.glob("*-of-*.lock")):
        if _count_of(path.stem) == _count_of(name):
            continue
        lock = FileLock(path)
        if not lock.acquire():
            return path
        lock.release()
    return None


def _count_of(name: str) -> str:
    return name.rpartition("-of-")[2]


def _local_holder(folder: Path, is_whole: bool) -> Holder | None:
    """Whoever of the lock files' writers still lives: the whole run, or for one any slice's run."""
    paths = sorted(folder.glob("*.lock")) if is_whole else [folder / f"{WHOLE}.lock"]
    holders = [h for p in paths if (h := _read_holder(p)) is not None]
    alive = [h for h in holders if h.is_dead_here() is not True]
    return next(iter(alive or holders), None)


def _read_holder(path: Path) -> Holder | None:
    try:
        return _holder_from(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


def _holder_from(record: Any) -> Holder | None:
    try:
        return Holder(**record)
    except TypeError:
        return None


class _ObjectLease:
    def __init__(self, store: Store, name: str, number: int, holder: Holder) -> None:
        self._store = store
        self._name = name
        self._number = number
        self._holder = holder
        self._counter = 0
        self._is_released = False
        self._lock = threading.Lock()  # a beat in flight must not overwrite the release

    @property
    def key(self) -> str:
        return _object_key(self._name, self._number)

    def record(self) -> bytes:
        record = asdict(self._holder)
        record |= {"counter": self._counter, "released": self._is_released}
        return json.dumps(record).encode()

    def create(self) -> bool:
        return self._store.create(self.key, self.record())

    def beat(self) -> None:
        if self._is_released:
            return
        if _newest(self._store).get(self._name, self._number) > self._number:
            other = _read_object(self._store, self._name, self._number + 1)
            raise _refusal(self._store.url, other[0] if other else None)
        with self._lock:
            if not self._is_released:
                self._counter += 1
                self._store.put(self.key, self.record())

    def release(self) -> None:
        with self._lock:
            if not self._is_released:
                self._is_released = True
                self._store.put(self.key, self.record())

    def forget_older(self) -> None:
        self._store.delete(
            [_object_key(self._name, n) for n in range(max(1, self._number - 3), self._number)]
        )


def _object_key(name: str, number: int) -> str:
    return f"{LEASES_PREFIX}{name}-{number:06d}.json"


def _newest(store: Store) -> dict[str, int]:
    newest: dict[str, int] = {}
    for info in store.list(LEASES_PREFIX):
        if match := _OBJECT_NAME.fullmatch(info.key.rsplit("/", 1)[-1]):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    return newest


def _read_object(store: Store, name: str, number: int) -> tuple[Holder | None, int, bool] | None:
    """(holder, counter, released); None if the object is gone."""
    try:
        record = json.loads(store.read(_object_key(name, number)))
    except FileNotFoundError:
        return None
    counter, is_released = record.pop("counter", 0), record.pop("released", False)
    return _holder_from(record), counter, is_released


def _acquire_object(
    store: Store, name: str, holder: Holder, watch_s: float, sleep: Callable[[float], None]
) -> Lease:
    while True:
        newest = _newest(store)
        number = newest.get(name, 0)
        if number:
            _refuse_if_alive(store, name, number, watch_s, sleep)
        lease = _ObjectLease(store, name, number + 1, holder)
        if lease.create():
            break  # else somebody was faster: look at the new holder

    def sleep_alive(seconds: float) -> None:
        lease.beat()  # else whoever watches us meanwhile takes us for dead
        sleep(seconds)

    try:
        # After our own is visible: of two runs that exclude each other at least one sees the other.
        for other, number in _newest(store).items():
            if other == name:
                continue
            if WHOLE in (other, name) or _count_of(other) != _count_of(name):
                _refuse_if_alive(store, other, number, watch_s, sleep_alive)
    except LeaseHeld:
        lease.release()
        raise
    lease.forget_older()
    return lease


def _refuse_if_alive(
    store: Store, name: str, number: int, watch_s: float, sleep: Callable[[float], None]
) -> None:
    """Return if the holder is dead or has released; raise LeaseHeld if it lives."""
    first = _read_object(store, name, number)
    waited_s = 0.0
    while first is not None and not first[2]:
        holder, counter, _ = first
        is_dead = holder.is_dead_here() if holder else None
        if is_dead is not None:
            if is_dead:
                return
            raise _refusal(store.url, holder)
        if waited_s >= watch_s:
            return
        sleep(_POLL_S)
        waited_s += _POLL_S
        now = _read_object(store, name, number)
        if now is None:
            return
        if now[1] != counter and not now[2]:
            raise _refusal(store.url, now[0])
        first = now


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
