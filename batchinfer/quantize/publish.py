"""Folders that are there as a whole or not at all, and that one process makes while others wait.

Must not know: what is in them. A folder is filled under another name and renamed when everything is
on the disk, so that a process killed at any moment leaves nothing that would be taken for it; what
it leaves is deleted by the next who makes that folder.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.storage.flock import FileLock
from batchinfer.storage.local_errors import os_errors

_POLL_S = 0.2


def publish_folder(
    target: Path,
    fill: Callable[[Path], None],
    *,
    on_wait: Callable[[], None],
    advice: str,
) -> bool:
    """`fill` an empty folder and call it `target`; False if it is there, perhaps made meanwhile.

    An empty folder of that name is not there, and is replaced when everything is on the disk.
    `on_wait` is called once if another process makes it now. `advice` tells what to do if it cannot
    be written.
    """
    if _is_there(target):  # perhaps on a disk that takes no lock any more
        return False
    with _making(target, on_wait, advice):
        if _is_there(target):
            return False
        for leftover in _leftovers(target):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with os_errors("write", temporary):
                temporary.mkdir()
            fill(temporary)
            with os_errors("write", target):
                _flush(temporary)
                temporary.rename(target)
                _flush_entry(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return True


def _is_there(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _leftovers(target: Path) -> list[Path]:
    """Of processes that were killed while they made `target`, and of no other name."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


@contextmanager
def _making(target: Path, on_wait: Callable[[], None], advice: str) -> Iterator[None]:
    lock = FileLock(target.parent / f".{target.name}.lock")
    is_told = False
    while not _acquire(lock, advice):
        if not is_told:
            is_told = True
            on_wait()
        time.sleep(_POLL_S)
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
