"""The Store contract's errors for the operating system's, by errno.

Must not know: keys. FileNotFoundError passes unchanged: what it means depends on what was done.
Whatever is in no list here may pass by itself, so it is a reason to try again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from batchinfer.errors import ConfigError, TransientError
from batchinfer.limits import file_limit, memory_limit, sentence, size_limit

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = {  # what to do about what stays refused until somebody does something
    **dict.fromkeys([errno.EACCES, errno.EPERM, errno.EROFS], "Check its owner, mode and mount"),
    **dict.fromkeys([errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG], "Use another path"),
    **dict.fromkeys([errno.ELOOP, errno.EINVAL, errno.EILSEQ], "Use another path"),
    **dict.fromkeys(
        [errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK],
        "This file system cannot do that: use a path on another",
    ),
    errno.EFBIG: "",  # the limit is named
}


def _advice(number: int) -> str:
    """What to do about an error that may pass. Limits are read when they are met."""
    if number == errno.EMFILE:
        return f"{sentence(file_limit())}, and start again"
    if number == errno.ENFILE:
        return "The whole machine has too many open files: end others and start again"
    if number == errno.ENOMEM:
        limit = memory_limit()
        return f"{sentence(limit)}, and start again" if limit else "Free memory and start again"
    return "Start again when that has passed"


def _full(path: str | os.PathLike[str], number: int) -> str:
    """What of the file system is used up: bytes, files or a quota of either."""
    where = Path(path).absolute().parent
    if number == errno.EDQUOT:
        return (
            f"quota used up while writing {path}: delete what is not needed, files as well as "
            "bytes (see `quota`), and start again"
        )
    with suppress(OSError):
        has = os.statvfs(where)
        if has.f_files > 0 and has.f_favail == 0 and has.f_bavail > 0:
            return (
                f"the file system of {where} has no inodes left (see `df -i`), though bytes are "
                f"free: delete files there, not only large ones, and start again ({path})"
            )
    return f"disk full while writing {path}: free space and start again"


@contextmanager
def os_errors(verb: str, path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = f"cannot {verb} {path}: {error.strerror or error}"
        number = error.errno or 0
        if number in _DISK_FULL:
            raise TransientError(_full(path, number)) from error
        if number == errno.ENOTDIR and (problem := why_no_folder(Path(path).parent)):
            raise ConfigError(f"cannot {verb} {path}: {problem}") from error
        if number in _FORBIDDEN:
            advice = sentence(size_limit()) if number == errno.EFBIG else _FORBIDDEN[number]
            raise ConfigError(f"{reason}. {advice}") from error
        raise TransientError(f"{reason}. {_advice(number)}") from error


def why_no_folder(path: Path) -> str | None:
    """What is in the way of a folder at `path`: a file or a link to nothing, there or above."""
    for folder in (path, *path.parents):
        with os_errors("read", folder):
            if folder.is_dir():
                return None
            if folder.exists():
                return f"{folder} is a file where a folder is needed: remove or move that file"
            if folder.is_symlink():
                return (
                    f"{folder} is a link to nothing ({folder.readlink()}): create the folder that "
                    "it leads to, or remove the link"
                )
    return None


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

    def close(self) -> None:
        with os_errors("close", self.name):  # where NFS and quotas say what did not reach the disk
            super().close()
