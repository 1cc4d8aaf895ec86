"""The input as a sorted list of shards, from files, folders and globs, local or on S3.

Must not know: what is inside a shard. Invariant: names are unique (they are the output's relative
paths too), and each stored file is listed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import InputError
from batchinfer.source.partitions import Partitions, partitions_of
from batchinfer.source.patterns import SUFFIX, folder_regex, has_wildcard, parse_pattern
from batchinfer.storage import FileInfo, Store, is_s3, join_url, split_url

OpenStore = Callable[[str], Store]


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
    is not `.parquet`, or if two shards would write the same output file.
    """
    by_name: dict[str, Shard] = {}
    by_url: dict[str, str] = {}
    for path in paths:
        num_found = 0
        for shard in _shards_of(path, open_store):
            num_found += 1
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
        if not num_found:
            raise InputError(_nothing_found(path))
    return sorted(by_name.values(), key=lambda shard: shard.name)


def _shards_of(path: str, open_store: OpenStore) -> Iterator[Shard]:
    if has_wildcard(path):
        yield from _glob(path, open_store)
        return
    folder, name = split_url(path)
    if name and not path.endswith("/"):
        store = open_store(folder)
        found = store.stat(name) if name not in (".", "..") else None
        if found is not None:
            _require_suffix(store.url_of(name))
            yield _shard(store, found)
            return
    store = open_store(path)
    regex = folder_regex()
    yield from (_shard(store, found) for found in store.list() if regex.fullmatch(found.key))


def _glob(path: str, open_store: OpenStore) -> Iterator[Shard]:
    pattern = parse_pattern(path)
    store = open_store(pattern.root)
    for found in store.list(pattern.literal_prefix, recursive=pattern.is_recursive):
        if pattern.regex.fullmatch(found.key):
            _require_suffix(store.url_of(found.key), path)
            yield _shard(store, found)


def _shard(store: Store, found: FileInfo) -> Shard:
    partitions = partitions_of(found.key.split("/")[:-1])
    return Shard(found.key, store, found.key, found.size_bytes, found.version, partitions)


def _require_suffix(url: str, path: str | None = None) -> None:
    if not url.endswith(SUFFIX):
        matched = f" (matched by {path})" if path else ""
        raise InputError(
            f"input.path: {url}{matched} does not end in {SUFFIX}: "
            f"{'narrow the glob, as in *' + SUFFIX if path else 'only Parquet files can be input'}"
        )


def _common_glob(first: str, second: str) -> str:
    folders = [url.split("/")[:-1] for url in (first, second)]
    common = []
    for left, right in zip(*folders, strict=False):
        if left != right:
            break
        common.append(left)
    return join_url("/".join(common) or "/", f"**/*{SUFFIX}")


def _nothing_found(path: str) -> str:
    message = f"input.path: nothing matches {path}"
    if is_s3(path):
        return f"{message}. Check the bucket, the prefix and input.s3"
    root = parse_pattern(path).root if has_wildcard(path) else path
    folder = Path(root).expanduser().absolute()
    if folder.is_dir():
        return f"{message}: the folder {folder} is there, but has no such {SUFFIX} file"
    while not folder.is_dir():
        folder = folder.parent
    return f"{message}: the deepest folder of it that exists is {folder}"
