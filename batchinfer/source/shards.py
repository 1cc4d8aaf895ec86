"""The input as a sorted list of shards, from files, folders and globs, local or on S3.

Must not know: what is inside a shard. Invariant: names are unique (they are the output's relative
paths too), each stored file is listed once, and what a path matches is read, refused or said to be
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from batchinfer.errors import ConfigError, InputError
from batchinfer.source.left_out import LeftOut, Names, Why
from batchinfer.source.partitions import Partitions, parse_partitions
from batchinfer.source.patterns import SUFFIX, Pattern, has_wildcard, parse_pattern
from batchinfer.source.tables import Tables
from batchinfer.storage import FileInfo, Other, Store, is_s3, join_url, split_url

OpenStore = Callable[[str], Store]

_NO_NAMES = ("", ".", "..")
_NARROW = f"narrow the glob, as in *{SUFFIX}"
_EMPTY_PART = (
    "a part of the key is empty (//), `.` or `..`, which no output path can have: copy the object "
    "to another key, or narrow input.path"
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One input Parquet file. `name` is its path below the part of input.path without wildcards."""

    name: str
    store: Store
    key: str
    size_bytes: int
    version: str
    partitions: Partitions = ()  # hive folders in the name
    outer_partitions: Partitions = ()  # hive folders in the path before it

    @property
    def url(self) -> str:
        return self.store.url_of(self.key)


def list_shards(paths: Sequence[str], open_store: OpenStore) -> list[Shard]:
    """All shards of the input, sorted by name.

    `open_store(url)` opens a folder. Raises InputError if a path matches nothing or something that
    cannot be read, or if two shards would write the same output file. Warns of what is left out.
    """
    by_name: dict[str, Shard] = {}
    by_url: dict[str, str] = {}
    left_out = LeftOut()
    open_once = cache(open_store)
    for path in paths:
        for shard in _Listing(path, open_once, left_out).shards():
            twin = by_name.setdefault(shard.name, shard)
            if twin.url != shard.url:
                raise InputError(
                    f"input.path: {twin.url} and {shard.url} would both be written to the "
                    f"output as {shard.name}. Give one glob with a common folder instead, such as "
                    f"{_common_glob(twin.url, shard.url)}"
                )
            if by_url.setdefault(shard.url, shard.name) != shard.name:
                raise InputError(
                    f"input.path: {shard.url} is matched twice, as {by_url[shard.url]} and as "
                    f"{shard.name}: remove one of the paths"
                )
    shards = sorted(by_name.values(), key=lambda shard: shard.name)
    left_out.add_twins(shard.url for shard in shards if shard.store.is_local)
    left_out.warn()
    return shards


class _Listing:
    """What one input path means, and what it comes upon besides."""

    def __init__(self, path: str, open_store: OpenStore, left_out: LeftOut) -> None:
        self._path = path
        self._open_store = open_store
        self._left_out = left_out
        self._tables = Tables()
        self._unusable: dict[str, Names] = {}  # by what is wrong and what to do

    def shards(self) -> list[Shard]:
        """Raises InputError if there are none, or for what is matched and cannot be read."""
        path = self._path
        if is_s3(path) and "//" in path.removeprefix("s3://"):
            raise InputError(f"input.path {path}: {_EMPTY_PART}")
        pattern = parse_pattern(path, self._is_there)
        if not pattern.text and (file := self._file()) is not None:
            shards = [file]
        else:
            shards = self._matched(pattern)
        if has_wildcard(pattern.root):
            self._note_other_matches({shard.url for shard in shards})
        return shards

    def _file(self) -> Shard | None:
        """The one file that the path names, None for a folder or nothing."""
        folder, name = split_url(self._path)
        if not name or name in (".", "..") or self._path.endswith("/"):
            return None
        store = self._open_store(folder)
        info = store.stat(name)
        if info is None:
            return None
        if not name.endswith(SUFFIX):
            raise InputError(
                f"input.path: {store.url_of(name)} does not end in {SUFFIX}: only Parquet files "
                "can be input"
            )
        return _shard(store, info, parse_partitions(folder.split("/")))

    def _matched(self, pattern: Pattern) -> list[Shard]:
        store = self._open_store(pattern.root)
        outer = parse_partitions(pattern.root.split("/"))
        shards = [
            _shard(store, info, outer)
            for info in self._listed(store, pattern)
            if self._is_shard(store, pattern, info.key)
        ]
        if shards:
            self._tables.refuse(store, (shard.key for shard in shards))
        if self._unusable:
            problems = (f"input.path: {names}: {what}" for what, names in self._unusable.items())
            raise InputError("\n".join(problems))
        if not shards:
            raise InputError(_nothing_found(self._path, pattern.root, self._left_out))
        return shards

    def _listed(self, store: Store, pattern: Pattern) -> Iterator[FileInfo]:
        """All that may be read, and more; matched folders that are named like files are entered."""
        folders: list[str] = []

        def note(key: str, kind: Other) -> None:
            if kind is not Other.FOLDER:
                if pattern.is_read(key):
                    self._refuse(f"{kind.value}, not a file", store.url_of(key))
            elif pattern.is_named(key):
                if key.endswith(SUFFIX):
                    folders.append(key)
                else:
                    self._left_out.add(Why.FOLDER, store.url_of(key))

        yield from store.list(pattern.literal_prefix, recursive=pattern.is_recursive, on_other=note)
        for folder in folders:
            is_empty = True
            for info in store.list(f"{folder}/", on_other=note):
                is_empty = is_empty and not pattern.is_read(info.key)
                yield info
            if is_empty:
                self._refuse(f"a folder without any {SUFFIX} file", store.url_of(folder))

    def _is_shard(self, store: Store, pattern: Pattern, key: str) -> bool:
        """Whether a listed file is read; else it is noted if one could think so."""
        self._tables.see(key)
        if pattern.is_read(key):
            return self._is_usable(store.url_of(key))
        parts = key.split("/")
        spelt = "/".join(part for part in parts if part not in _NO_NAMES)
        if spelt != key and pattern.is_read(spelt):
            self._refuse(_EMPTY_PART, store.url_of(key))
        elif pattern.is_hidden(key) and key.endswith(SUFFIX):
            self._left_out.add(Why.HIDDEN, store.url_of(key))
        elif not pattern.text:
            if not any(part.startswith(("_", ".")) for part in parts):
                self._left_out.add(Why.OTHER_ENDING, store.url_of(key))
        elif key.endswith(SUFFIX):
            folders = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
            if (folder := next(filter(pattern.is_named, folders), None)) is not None:
                self._left_out.add(Why.FOLDER, store.url_of(folder))
        return False

    def _is_usable(self, url: str) -> bool:
        if not url.endswith(SUFFIX):
            self._refuse(f"matched by {self._path}, but does not end in {SUFFIX}: {_NARROW}", url)
        elif not _is_text(url):
            self._refuse("the name is not valid UTF-8: rename it", url)
        else:
            return True
        return False

    def _refuse(self, what: str, url: str) -> None:
        self._unusable.setdefault(what, Names()).add(url)

    def _is_there(self, path: str) -> bool:
        folder, name = split_url(path)
        if not name:  # a bucket
            return False
        store = self._open_store(folder)
        if store.stat(name) is not None:
            return True
        below = store.list(f"{name}/", on_other=lambda key, kind: None)
        return next(iter(below), None) is not None

    def _note_other_matches(self, urls: Collection[str]) -> None:
        """The path is read as a name; say what it would match as a pattern."""
        with suppress(ConfigError):  # it is none
            pattern = parse_pattern(self._path)
            store = self._open_store(pattern.root)
            listed = store.list(
                pattern.literal_prefix,
                recursive=pattern.is_recursive,
                on_other=lambda key, kind: None,
            )
            for info in listed:
                url = store.url_of(info.key)
                if pattern.is_read(info.key) and url not in urls:
                    self._left_out.add(Why.NOT_LITERAL, url)


def _shard(store: Store, info: FileInfo, outer: Partitions) -> Shard:
    key = info.key
    partitions = parse_partitions(key.split("/")[:-1])
    return Shard(key, store, key, info.size_bytes, info.version, partitions, outer)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _common_glob(first: str, second: str) -> str:
    folders = [url.split("/")[:-1] for url in (first, second)]
    common = []
    for left, right in zip(*folders, strict=False):
        if left != right:
            break
        common.append(left)
    return join_url("/".join(common) or "/", f"**/*{SUFFIX}")


def _nothing_found(path: str, root: str, left_out: LeftOut) -> str:
    message = f"input.path: nothing matches {path}"
    if beside := str(left_out):
        return f"{message}. {beside}"
    if "[" in path:
        message += " (for the character [ write [[])"
    if is_s3(path):
        return f"{message}. Check the bucket, the prefix and input.s3"
    folder = Path(root).expanduser().absolute()
    if folder.is_dir():
        return f"{message}: the folder {folder} is there, but has no such {SUFFIX} file"
    if folder.exists():
        return f"{message}: {folder} is {Other.SPECIAL.value}, not a file"
    while not folder.is_dir():
        folder = folder.parent
    return f"{message}: the deepest folder of it that exists is {folder}"
