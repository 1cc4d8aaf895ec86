"""The Store contract's errors for the operating system's, by errno.

Must not know: keys. FileNotFoundError, FileExistsError and whatever nobody foresaw pass unchanged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import TYPE_CHECKING

from batchinfer.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_WRONG_PATH = frozenset(
    {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EINVAL}
)
_OUTSIDE = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EMFILE, errno.ENFILE}
)


@contextmanager
def os_errors(verb: str, path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot {verb} {path}: {error.strerror}"
        if error.errno in _DISK_FULL:
            full = f"disk full while writing {path}: free space and start again"
            raise TransientError(full) from error
        if error.errno in _REFUSED:
            raise ConfigError(f"{reason}. Check its owner, its mode and the mount") from error
        if error.errno in _WRONG_PATH:
            raise ConfigError(f"{reason}. Use another path") from error
        if error.errno in _OUTSIDE:
            raise TransientError(f"{reason}. Start again when that has passed") from error
        raise


class CheckedFile(FileIO):
    """A file whose own reads and writes raise the Store's errors, whoever makes them."""

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        with os_errors("read", self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with os_errors("read", self.name):
            return super().readall()

    def write(self, content: ReadableBuffer, /) -> int:
        with os_errors("write", self.name):
            return super().write(content)
