"""The lease of a local output: `flock`, which the kernel frees when its holder dies.

`all.lock` is held exclusively by a run on the whole input and shared by all others: slices, each of
which also holds `<i>-of-<n>.lock`, and joined runs, which share `join.lock`. Must not know: what
the lease protects.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from batchinfer.errors import ConfigError, TransientError
from batchinfer.ledger.holder import Holder, lost, refusal, refusal_of_joined
from batchinfer.storage import Store
from batchinfer.storage.flock import FileLock, NoFileLocks, NoLockService, inode_of

#: How long a start that finds the lock taken waits for its holder to say who it is, or to end.
_WAIT_S = 1.0
_POLL_S = 0.05
_PROMISE = "set output.single_writer: true and let only one run at a time work on it"


class LocalLease:
    def __init__(self, folder: Path, locks: list[FileLock], made: list[Path]) -> None:
        self._output = folder.parent.parent
        self._locks = locks
        self._made = made
        self._is_released = False

    def beat(self) -> None:
        """Nothing to show, the kernel knows whether we live; but the files may be gone."""
        self.check()

    def check(self) -> None:
        """Raise LeaseLost if another run could take the lease, because its files are gone."""
        if not self._is_released and not all(lock.is_held() for lock in self._locks):
            raise lost(str(self._output))

    def proof(self) -> LocalProof:
        files = ((lock.path, inode_of(lock.path)) for lock in self._locks)
        found = tuple((path, known) for path, known in files if known is not None)
        return LocalProof(str(self._output), found, _content(self._locks[-1].path))

    def release(self) -> None:
        self._is_released = True
        for lock in reversed(self._locks):
            lock.release()

    def undo(self) -> None:
        """Release, and remove the files and empty folders that taking the lease made."""
        self._is_released = True
        for lock in reversed(self._locks):
            if lock.path in self._made:
                lock.delete()
            else:
                lock.release()
        with suppress(OSError):  # not empty: something was written after all
            for folder in (self._locks[0].path.parent, *self._locks[0].path.parent.parents):
                if folder not in self._made:
                    break
                folder.rmdir()


@dataclass(frozen=True, slots=True)
class LocalProof:
    """The lock files of a lease, as another process finds them, perhaps on another machine. Can be
    pickled.
    """

    output: str
    files: tuple[tuple[Path, tuple[int, int]], ...]  # with device and inode
    holder: bytes  # that the last of them names

    def open(self, store: Store) -> SeenLease:
        """Raises ConfigError where the output is not seen."""
        if self._is_of_here() or all(inode_of(path) == known for path, known in self.files):
            return SeenLease(self)
        # Another machine's number for the file system of a shared folder is another one.
        here = [(path, inode_of(path)) for path, _ in self.files]
        if self.files and _content(self.files[-1][0]) == self.holder:
            files = tuple((path, found) for path, found in here if found is not None)
            if len(files) == len(self.files):
                return SeenLease(replace(self, files=files))
        raise ConfigError(
            f"the output {self.output} of the machine that gives out the work is not what is there "
            f"on {socket.gethostname()}: all machines of a run have to see it under the same name. "
            "Use a folder that they share, or s3://"
        )

    def _is_of_here(self) -> bool:
        """Whether its holder runs on this machine, so what is not there was deleted."""
        holder = _parsed(self.holder)
        return holder is not None and holder.is_dead_here() is not None


class SeenLease:
    """A lease that another process holds: to be checked, and no more."""

    def __init__(self, proof: LocalProof) -> None:
        self._proof = proof

    def beat(self) -> None: ...

    def check(self) -> None:
        if any(inode_of(path) != known for path, known in self._proof.files):
            raise lost(self._proof.output)

    def proof(self) -> LocalProof:
        return self._proof

    def release(self) -> None: ...

    def undo(self) -> None: ...


class _Taken(Exception):
    """Somebody else has a lock; `paths` are those that its holder may have written into, `members`
    what joined runs say of themselves, if it may be theirs.
    """

    def __init__(self, where: str, paths: list[Path], members: list[Path] | None = None) -> None:
        self.where = where
        self.paths = paths
        self.members = members or []


def acquire_local(
    folder: Path, name: str, holder: Holder, *, whole: str, joint: str, single_writer: bool
) -> LocalLease:
    """The lease `name`, of which `whole` is the one that excludes all others, and `joint` one that
    any number may have.
    """
    deadline_s = time.monotonic() + _WAIT_S
    places = [folder / f"{whole}.lock", folder / f"{name}.lock", folder, *folder.parents]
    made = [place for place in places if not os.path.lexists(place)]
    while True:
        try:
            locks = _take(folder, name, whole, joint, single_writer)
            break
        except _Taken as taken:
            other = _holder(taken.paths)
            is_known = other is not None and other.is_dead_here() is not True
            if not is_known and taken.members:
                joined = _holder(taken.members)
                if joined is not None and joined.is_dead_here() is not True:
                    raise refusal_of_joined(taken.where, joined) from None
            if is_known or time.monotonic() > deadline_s:
                raise refusal(taken.where, other) from None
        except NoFileLocks as error:
            raise ConfigError(
                f"{error}, so two runs on one output could not be distinguished. Mount it with "
                f"locks, choose another output.path, or {_PROMISE}"
            ) from error
        except NoLockService as error:
            raise TransientError(
                f"{error}. Start again when its lock service answers, or {_PROMISE}"
            ) from error
        time.sleep(_POLL_S)
    lease = LocalLease(folder, locks, made)
    try:
        if name != joint:  # else each says so in a file of its own
            locks[-1].write(json.dumps(asdict(holder)).encode())
    except BaseException:
        lease.release()
        raise
    return lease


def _take(folder: Path, name: str, whole: str, joint: str, single_writer: bool) -> list[FileLock]:
    """All locks of the lease `name`, or none. Raises _Taken."""
    output = str(folder.parent.parent)
    first = FileLock(folder / f"{whole}.lock", is_promised=single_writer)
    if not first.acquire(shared=name != whole):
        if name != whole:
            raise _Taken(output, [first.path])
        raise _Taken(output, sorted(folder.glob("*.lock")), sorted(folder.glob(f"{joint}-*.json")))
    if name == whole:
        return [first]
    try:
        own = FileLock(folder / f"{name}.lock", is_promised=single_writer)
        if not own.acquire(shared=name == joint):
            raise _Taken(f"slice {name} of {output}", [own.path])
        if (other := _in_the_way(folder, name, joint)) is not None:
            own.release()
            if other.stem == joint:
                raise _Taken(output, [], sorted(folder.glob(f"{joint}-*.json")))
            raise _Taken(f"slice {other.stem} of {output}", [other])
    except BaseException:
        first.release()
        raise
    return [first, own]


def _in_the_way(folder: Path, name: str, joint: str) -> Path | None:
    """The lock of a live slice whose shards overlap with ours, or of joined runs.

    Looked for after taking our own, so of two that start together at least one sees the other.
    """
    paths = sorted(folder.glob("*-of-*.lock"))
    if name != joint:
        paths = [path for path in paths if count_of(path.stem) != count_of(name)]
        paths += folder.glob(f"{joint}.lock")
    for path in paths:
        lock = FileLock(path, is_promised=True)
        if not lock.acquire():
            return path
        lock.release()
    return None


def count_of(name: str) -> str:
    """n of a slice's name."""
    return name.rpartition("-of-")[2]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _holder(paths: list[Path]) -> Holder | None:
    """Whoever of the lock files' writers still lives."""
    holders = [found for path in paths if (found := _read_holder(path)) is not None]
    alive = [found for found in holders if found.is_dead_here() is not True]
    return next(iter(alive or holders), None)


def _read_holder(path: Path) -> Holder | None:
    return _parsed(_content(path))


def _parsed(content: bytes) -> Holder | None:
    try:
        return Holder.from_record(json.loads(content))
    except ValueError:
        return None
