"""Folders that are there as a whole or not at all, and that one process makes while others wait.

Must not know: what is in them. A folder is filled under another name and renamed when everything is
on the disk, so that a process killed at any moment leaves nothing that would be taken for it; what
it leaves is deleted by the next who makes that folder, or by a `sweep` of all names.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchinfer.errors import ConfigError, TransientError
from batchinfer.storage.flock import FileLock
from batchinfer.storage.local_errors import os_errors

_POLL_S = 0.2
#: What there is of a name besides its folder.
_LEFTOVER = re.compile(r"\.(.+)\.(?:[0-9a-f]{8}\.tmp|lock)")


def publish_folder(
    target: Path,
    fill: Callable[[Path], None],
    *,
    on_wait: Callable[[], None],
    advice: str,
    file_name: str | None = None,
) -> bool:
    """`fill` an empty folder and call it `target`; False if it is there, perhaps made meanwhile.

    `file_name`: of the only file that is wanted of the folder; then `target` is that file.
    An empty folder of that name is not there, and is replaced when everything is on the disk.
    `on_wait` is called once if another process makes it now. `advice` says what to do if it cannot
    be written.
    """
    if is_there(target):  # perhaps on a disk that takes no lock any more
        return False
    with _making(target, on_wait, advice):
        if is_there(target):
            return False
        _delete_leftovers(target)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with os_errors("write", temporary):
                temporary.mkdir()
            fill(temporary)
            with os_errors("write", target):
                _flush(temporary)
                (temporary if file_name is None else temporary / file_name).rename(target)
                _flush_entry(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if file_name is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def sweep(folder: Path) -> None:
    """Delete what killed processes left of any name in `folder`, in which everything is made so.

    Their locks show it, not their age: a name whose lock is held is being made, by us or by others.
    """
    found = (_LEFTOVER.fullmatch(path.name) for path in folder.iterdir())
    for name in sorted({match[1] for match in found if match}):
        lock = FileLock(folder / f".{name}.lock")
        with suppress(OSError, ConfigError, TransientError):  # then it stays for another time
            if lock.acquire():
                with _held(lock):
                    _delete_leftovers(folder / name)


def is_there(target: Path) -> bool:
    """Whether something would be lost by `target`'s being replaced."""
    return any(target.iterdir()) if target.is_dir() else target.exists()


def _delete_leftovers(target: Path) -> None:
    """Delete what processes left that were killed while making `target`, and nothing else."""
    for path in target.parent.iterdir():
        found = _LEFTOVER.fullmatch(path.name)
        if found and found[1] == target.name and path.suffix == ".tmp":
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _making(target: Path, on_wait: Callable[[], None], advice: str) -> Iterator[None]:
    lock = FileLock(target.parent / f".{target.name}.lock")
    is_told = False
    while not _acquire(lock, advice):
        if not is_told:
            is_told = True
            on_wait()
        time.sleep(_POLL_S)
    with _held(lock):
        yield


@contextmanager
def _held(lock: FileLock) -> Iterator[None]:
    try:
        yield
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, advice: str) -> bool:
    try:
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire()
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}"
        raise ConfigError(
            f"cannot make {lock.path.parent} or write there: {reason}. {advice}"
        ) from error


def _flush(folder: Path) -> None:
    """Everything in the folder is on the disk before its name says that it is."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            _flush_entry(file)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
