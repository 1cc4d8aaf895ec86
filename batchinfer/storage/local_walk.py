"""What is in folders of a file system, in the order of keys.

Must not know: which of the files are whose, temporary names.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from batchinfer.storage.base import Other
from batchinfer.storage.local_errors import os_errors

Found = tuple[str, "os.DirEntry[str]"]


def status_of(entry: os.DirEntry[str]) -> os.stat_result | Other | None:
    """A file's status, else what it is. None: deleted or renamed since the folder was read."""
    with os_errors("read", entry.path):
        try:
            found = entry.stat()
        except FileNotFoundError:
            return Other.DEAD_LINK if entry.is_symlink() else None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return Other.DEAD_LINK
    if stat.S_ISREG(found.st_mode):
        return found
    return Other.FOLDER if stat.S_ISDIR(found.st_mode) else Other.SPECIAL


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # links in a circle
        if error.errno != errno.ELOOP:
            raise
        return False


def walk_folder(
    folder: Path,
    key_prefix: str,
    name_prefix: str,
    recursive: bool,
    ancestors: frozenset[tuple[int, int]],
) -> Iterator[Found]:
    """In the order of whole keys: a folder sorts as `name/`, so `a-b/x` precedes `a/x`."""
    with os_errors("read", folder):
        try:
            found = folder.stat()
            with os.scandir(folder) as scan:
                entries = [(f"{e.name}/" if _is_folder(e) else e.name, e) for e in scan]
        except (FileNotFoundError, NotADirectoryError):
            return
    this = (found.st_dev, found.st_ino)
    if this in ancestors:  # a link back up the tree
        return
    for name, entry in sorted(entries, key=lambda named: named[0]):
        if not name.startswith(name_prefix):
            continue
        if not name.endswith("/"):
            yield key_prefix + name, entry
        elif not recursive:
            yield key_prefix + name.removesuffix("/"), entry
        else:
            below = Path(entry.path)
            yield from walk_folder(below, key_prefix + name, "", True, ancestors | {this})
