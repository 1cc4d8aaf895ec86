"""Advisory locks on local files. The kernel frees them when the process dies, however it dies.

Must not know: what is locked. A lock belongs to an inode: the file is never replaced, only
rewritten, or deleted by its holder; a lock on a deleted file is none.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from batchinfer.errors import ConfigError, TransientError
from batchinfer.storage.local_errors import os_errors

logger = logging.getLogger(__name__)

_MAX_FOLDER_TRIES = 20
_HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES})  # the latter from SMB shares
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EBADF})


class NoFileLocks(ConfigError):
    """The file system has no locks."""


class NoLockService(TransientError):
    """The file system has locks, but what grants them does not answer (NFS without lockd)."""


class FileLock:
    """A `flock` on `path`, which is created with its folders.

    Closed on exec, so children do not hold it. `is_promised`: somebody promises that nobody else
    takes it, so a file system without locks will do.
    """

    def __init__(self, path: Path, *, is_promised: bool = False) -> None:
        self.path = path
        self._is_promised = is_promised
        self._fd: int | None = None

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock without waiting; False if somebody else holds it.

        Raises NoFileLocks, NoLockService, and the errors of a Store.
        """
        fd = self._open()
        try:
            is_ours = self._lock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if is_ours and _is_named(fd, self.path):
                self._fd = fd
                return True
        finally:
            if self._fd != fd:
                os.close(fd)
        return False

    def is_held(self) -> bool:
        """Whether we took it and its file is still the one at `path`."""
        return self._fd is not None and _is_named(self._fd, self.path)

    def write(self, content: bytes) -> None:
        """Say who holds the lock. Only while holding it exclusively."""
        assert self._fd is not None
        with os_errors("write", self.path):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, content, 0)

    def delete(self) -> None:
        """Release it and delete its file, unless others share the lock or the file is not ours."""
        with suppress(OSError, TransientError, ConfigError):
            if self._fd is not None:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(self._fd, self.path):
                    self.path.unlink()
        self.release()

    def release(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with suppress(OSError):  # what was written says who holds it, and nobody does now
                os.close(fd)

    def _open(self) -> int:
        """Again if somebody else's `delete` just found its folder empty."""
        for _ in range(_MAX_FOLDER_TRIES):
            with suppress(FileNotFoundError), os_errors("write", self.path):
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                except FileExistsError as error:
                    raise ConfigError(
                        f"cannot create the lock file {self.path}: {error.strerror}. Make that "
                        "folder writable or choose another"
                    ) from error
        raise ConfigError(
            f"cannot write {self.path}: its folder cannot be created, or is deleted right after. "
            "Choose another path"
        )

    def _lock(self, fd: int, how: int) -> bool:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            has_locks = error.errno not in _NO_LOCKS
            if self._is_promised and (not has_locks or error.errno == errno.ENOLCK):
                logger.warning("%s: no file locks here (%s)", self.path.parent, error.strerror)
                return True
            if has_locks:
                raise NoLockService(f"cannot lock {self.path}: {error.strerror}") from error
            raise NoFileLocks(
                f"{self.path.parent} is on a file system that has no file locks ({error.strerror})"
            ) from error
        return True


def inode_of(path: Path) -> tuple[int, int] | None:
    """By which a file is the same one; None: it is gone."""
    with os_errors("read", path):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return status.st_dev, status.st_ino


def _is_named(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    with os_errors("read", path):
        try:
            return os.path.samestat(os.fstat(fd), path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
