"""Advisory locks on local files. The kernel frees them when the process dies, however it dies.

Must not know: what is locked. A lock belongs to an inode: the file is never replaced, only
rewritten, or deleted by its holder; a lock on a deleted file is none.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.storage.local_errors import os_errors


class FileLock:
    """A `flock` on `path`, which is created with its folders.

    Closed on exec, so children do not hold it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock without waiting; False if somebody else holds it."""
        try:
            with os_errors("write", self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"cannot create the lock file {self.path}: {error.strerror}. "
                "Make that folder writable or choose another"
            ) from error
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        if not _is_named(fd, self.path):
            os.close(fd)
            return False
        self._fd = fd
        return True

    def write(self, content: bytes) -> None:
        """Say who holds the lock. Only while holding it exclusively."""
        assert self._fd is not None
        with os_errors("write", self.path):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, content, 0)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _is_named(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
