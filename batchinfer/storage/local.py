"""A folder as a Store: temporary file, fsync, rename, fsync of the folder.

Must not know: Parquet, rows, S3. Invariant: a key's file is complete from the moment it is visible,
and stays after a power cut once `publish`, `put` or `create` has returned.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import BinaryIO

from batchinfer.errors import InputError, TransientError
from batchinfer.storage.base import FileInfo, OnOther, Other
from batchinfer.storage.local_errors import CheckedFile, os_errors, why_no_folder
from batchinfer.storage.local_walk import Found, status_of, walk_folder
from batchinfer.storage.urls import join_url, local_path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_TEMPORARY_BYTES = len("..01234567.tmp")  # that a temporary name has more than its file's
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095
_WRITE_BUFFER_BYTES = 1024 * 1024
_MAX_FOLDER_TRIES = 20
_MAX_CREATE_TRIES = 5
# FAT, SMB, some FUSE mounts, and names that are on another disk than they seem to be.
_NO_HARD_LINKS = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}
)
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})  # as well


class LocalStore:
    """Keys are paths below the root. Links on the way to it and inside keys are followed."""

    is_local = True

    def __init__(self, root: str) -> None:
        path = local_path(root).absolute()
        # `link/..` is the parent of the link's target: only resolving gives the folder meant.
        self._root = path.resolve() if ".." in path.parts else path
        self.url = str(self._root)

    def url_of(self, key: str) -> str:
        return join_url(self.url, key)

    def why_no_file(self, key: str) -> str | None:
        path = os.fsencode(self._path(key))
        *folders, name = map(len, path.split(b"/"))
        longest = max(*folders, name + _TEMPORARY_BYTES)
        if longest > _MAX_NAME_BYTES:
            return (
                f"a name in it is {longest - _MAX_NAME_BYTES} bytes too long for a file system, "
                "with what is written beside it"
            )
        if len(path) + _TEMPORARY_BYTES > _MAX_PATH_BYTES:
            return f"with {len(path):,} bytes it is too long for a path"
        return None

    def parents(self) -> Iterator[LocalStore]:
        for folder in self._root.resolve().parents:
            yield LocalStore(str(folder))

    def list(
        self, prefix: str = "", *, recursive: bool = True, on_other: OnOther | None = None
    ) -> Iterator[FileInfo]:
        for key, entry in self._walk(prefix, recursive=recursive):
            if _TEMPORARY.fullmatch(entry.name):
                continue
            found = status_of(entry)
            if isinstance(found, Other):
                if on_other is not None:
                    on_other(key, found)
                elif found is Other.DEAD_LINK:
                    raise InputError(f"{entry.path} is a link to nothing")
            elif found is not None:
                yield _file_info(key, found)

    def stat(self, key: str) -> FileInfo | None:
        path = self._path(key)
        with os_errors("read", path):
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _file_info(key, found) if stat.S_ISREG(found.st_mode) else None

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with os_errors("read", path):
            try:
                return BufferedReader(CheckedFile(path, "rb"))
            except (NotADirectoryError, IsADirectoryError) as error:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from error

    def put(self, key: str, content: bytes) -> None:
        def write(file: BinaryIO) -> None:
            file.write(content)

        self.publish(key, write)

    def create(self, key: str, content: bytes) -> bool:
        for _ in range(_MAX_CREATE_TRIES):
            with suppress(FileNotFoundError):  # somebody cleaned up here: folder or temporary file
                return self._create(key, content)
        raise _vanished(self._path(key))

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> None:
        self._publish(key, write, _replace)

    def publish_once(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        return self._publish(key, write, _link)

    def _publish(
        self,
        key: str,
        write: Callable[[BinaryIO], None],
        appear: Callable[[Path, Path], bool],
    ) -> bool:
        path = self._path(key)
        with _temporary(path) as temporary:
            with _new_file_for(path, temporary) as file:
                write(file)
                _fsync(file)
            try:
                with os_errors("write", path):
                    is_ours = appear(temporary, path)
                _fsync_folder(path.parent)
            except FileNotFoundError as error:
                raise _vanished(path) from error
        return is_ours

    def delete(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self._path(key)
            with os_errors("delete", path):
                try:
                    path.unlink()
                except (FileNotFoundError, NotADirectoryError):
                    continue
            folders.add(path.parent)
        for folder in folders:
            self._fsync_or_remove(folder)

    def sweep(self, owns: Callable[[str], bool]) -> int:
        num_removed = 0
        for key, entry in self._walk("", recursive=True):
            temporary = _TEMPORARY.fullmatch(entry.name)
            if temporary and owns(key.removesuffix(entry.name) + temporary["name"]):
                with os_errors("delete", entry.path):
                    Path(entry.path).unlink(missing_ok=True)
                num_removed += 1
        return num_removed

    def supports_create(self, key: str) -> bool:
        self.create(key, secrets.token_bytes(16))
        is_refused = not self.create(key, secrets.token_bytes(16))
        self.delete([key])
        return is_refused

    def close(self) -> None:
        """Nothing is held open."""

    def _fsync_or_remove(self, folder: Path) -> None:
        """A folder left empty goes, and those above that it leaves empty, but not the root."""
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:  # mostly ENOTEMPTY; whatever it is, an empty folder does no harm
                break
            folder = folder.parent
        with suppress(FileNotFoundError):  # somebody else removed it
            _fsync_folder(folder)

    def _path(self, key: str) -> Path:
        assert key and not key.startswith("/") and ".." not in key.split("/"), key
        return self._root / key

    def _walk(self, prefix: str, *, recursive: bool) -> Iterator[Found]:
        """Every file whose key starts with `prefix`, temporary ones too, in key order; a folder
        only where it is not entered.
        """
        folder_key, _, name_prefix = prefix.rpartition("/")
        key_prefix = f"{folder_key}/" if folder_key else ""
        folder = self._root / folder_key
        return walk_folder(folder, key_prefix, name_prefix, recursive, frozenset())

    def _create(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        with _temporary(path) as temporary:
            with _new_file_for(path, temporary) as file:
                file.write(content)
                _fsync(file)
            with os_errors("write", path):
                try:
                    os.link(temporary, path)
                    is_ours = True
                except FileExistsError:
                    is_ours = self._holds(key, content)
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    is_ours = self._create_without_links(key, content)
            _fsync_folder(path.parent)
        return is_ours

    def _holds(self, key: str, content: bytes) -> bool:
        try:
            return self.read(key) == content
        except FileNotFoundError:  # taken and deleted again: in any case not ours
            return False

    def _create_without_links(self, key: str, content: bytes) -> bool:
        """One winner too, but a reader may see the file half written, and a crash leaves it so."""
        path = self._path(key)
        with os_errors("write", path):
            try:
                file: BufferedWriter = BufferedWriter(CheckedFile(path, "xb"))
            except FileExistsError:
                return self._holds(key, content)
        with file:
            file.write(content)
            _fsync(file)
        return True


def _replace(temporary: Path, path: Path) -> bool:
    temporary.replace(path)
    return True


def _link(temporary: Path, path: Path) -> bool:
    """False if there is something at `path`. Without hard links two at one moment may both win."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return not path.exists() and _replace(temporary, path)
    return True


def _vanished(path: Path) -> TransientError:
    return TransientError(
        f"cannot write {path}: its folder or temporary file was deleted in the meantime. "
        "Find out what deletes files there, then start again"
    )


def _file_info(key: str, found: os.stat_result) -> FileInfo:
    return FileInfo(key, found.st_size, str(found.st_mtime_ns))


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A fresh name beside `path`; what is left there goes at the end."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        with suppress(OSError):  # after a rename there is none; else the real error is on its way
            temporary.unlink()


def _make_folder(folder: Path) -> None:
    """Create missing folders from the top, each durable before the next."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if (problem := why_no_folder(folder)) is not None:  # else somebody just found it empty
            raise NotADirectoryError(errno.ENOTDIR, problem) from None
    _fsync_folder(folder.parent)


def _new_file_for(path: Path, temporary: Path) -> BufferedWriter:
    """Make its folder if need be; again if a `delete` elsewhere just found that one empty."""
    with os_errors("write", path):
        for _ in range(_MAX_FOLDER_TRIES):
            with suppress(FileNotFoundError):
                _make_folder(path.parent)
                return _new_file(temporary)
        # /proc and its like hold what the kernel puts there, nothing else
        raise NotADirectoryError(errno.ENOTDIR, f"cannot create a folder at {path.parent}")


def _new_file(path: Path) -> BufferedWriter:
    with os_errors("write", path):
        return BufferedWriter(CheckedFile(path, "xb"), _WRITE_BUFFER_BYTES)


def _fsync(file: BufferedWriter) -> None:
    file.flush()
    with os_errors("write", file.name):
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    with os_errors("write", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_FSYNC:
                raise
        finally:
            os.close(descriptor)
