"""What the program asks of storage: one root, keys below it, atomic publishing, create-if-absent.

Must not know: Parquet, rows, what a key means. Retries happen behind this interface and nowhere
else. Keys are relative to the root, '/'-separated, never start with '/'. Methods may be called from
several threads at the same time.

Errors every method may raise: TransientError (75: down past the retries, disk full), ConfigError
(2: no permission, no such bucket, wrong credentials). FileNotFoundError means just that: not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Protocol


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One stored file. `version` changes with the content: mtime in ns (local), ETag (S3)."""

    key: str
    size_bytes: int
    version: str


#: Called for what a listing finds that is not a file: its key, and `Other`.
OnOther = Callable[[str, "Other"], None]


class Other(Enum):
    """What can be where a file is looked for."""

    FOLDER = "a folder"
    DEAD_LINK = "a link to nothing"
    SPECIAL = "a pipe, a socket or a device"


class Store(Protocol):
    """A folder (local) or a bucket prefix (S3)."""

    url: str  # normalised, without a trailing slash: "/abs/path" or "s3://bucket/prefix"
    is_local: bool

    def url_of(self, key: str) -> str:
        """The full URL of a key, for messages."""

    def why_no_file(self, key: str) -> str | None:
        """Why nothing can be published under a key, however the store is; None if it can."""

    def parents(self) -> Iterator[Store]:
        """The folders above the root, nearest first; a local root's as it is without links."""

    def list(
        self, prefix: str = "", *, recursive: bool = True, on_other: OnOther | None = None
    ) -> Iterator[FileInfo]:
        """Files whose key starts with `prefix` (a plain string prefix, as in S3), sorted by key.

        Temporary files of this module are not listed. A missing folder is an empty listing.
        `recursive=False`: only files directly in the folder that `prefix` up to its last '/' names.
        `on_other(key, kind)` is called for anything else: folders that are not entered, and on a
        file system whatever is not a file. Without it a broken link is an InputError.
        """

    def stat(self, key: str) -> FileInfo | None:
        """Size and version of one file, None if it is not there."""

    def read(self, key: str) -> bytes:
        """All bytes of a small file. Raises FileNotFoundError."""

    def open(self, key: str) -> BinaryIO:
        """A seekable binary reader; each read is retried by range. Raises FileNotFoundError."""

    def put(self, key: str, content: bytes) -> None:
        """Create or replace a small file atomically and durably."""

    def create(self, key: str, content: bytes) -> bool:
        """Create a file if the key is absent; False if it is there with other content.

        True also if it holds exactly `content` (our own create whose reply was lost), so put
        something unique into `content`. Of several concurrent creators with different content
        exactly one gets True.
        """

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> None:
        """Write a file of any size in bounded memory; it appears under `key` atomically, durably.

        `write` gets a fresh sequential writer (write, tell, flush). If `write` raises, nothing
        appears and the error passes through. Replaces an existing file.
        """

    def publish_once(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        """As `publish`, if the key is absent; False if it is there (perhaps by our own request,
        whose reply was lost). Of several concurrent writers one gets True, except where a store
        ignores the condition on a large upload: there the last one replaces the others.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files; absent ones are fine."""

    def sweep(self, owns: Callable[[str], bool]) -> int:
        """Remove what dead publishers left for keys that `owns(key)` accepts. Returns how many.

        Local: temporary files; S3: incomplete multipart uploads. Only call while holding the lease.
        """

    def supports_create(self, key: str) -> bool:
        """Whether create-if-absent really refuses: creates `key` twice, then deletes it.

        `key` must be the caller's own: no other run may probe with it at the same time.
        """

    def close(self) -> None:
        """Release connections. Idempotent."""
