"""Which files below OUT are this output's: only those are read as results, swept or deleted.

Must not know: leases, what is computed. Invariants: nothing here writes; a file is this output's if
its footer names a digest that this output has had and the shard at whose place it is. Outputs
do not nest: what is in a folder with a `_batchinfer` of its own is another's, also over a link.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.ledger import Survey, layout, read_facts
from batchinfer.storage import Store, join_url, open_store, split_url

_FOOTER_THREADS = 16
_ADVICE = "Choose an output.path that shares no folder with another output"


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Other outputs that share a folder with this one, by URL."""

    below: str | None = None
    behind_link: tuple[str, str] | None = None  # (folder of ours, the other output)
    above: str | None = None  # while this one is not begun


@dataclass(frozen=True, slots=True)
class Origin:
    """What a `.parquet` below OUT says of itself; None: it is not a result at all."""

    digest: str | None = None
    shard: str | None = None


def find_neighbours(
    store: Store, survey: Survey, shards: Iterable[str], *, is_begun: bool
) -> Neighbours:
    """`shards`: names of the input's, whose finished files will be at those places below OUT."""
    below = store.url_of(min(survey.nested)) if survey.nested else None
    link = _link_into_output(store, [*survey.finished, *shards]) if store.is_local else None
    return Neighbours(below, link, None if is_begun else _output_above(store))


def refuse_neighbours(url: str, others: Neighbours) -> None:
    """Raise ConfigError if another output is below OUT, or OUT would begin inside another."""
    if others.below is not None:
        raise ConfigError(
            f"{others.below} is an output of its own inside output.path {url}. {_ADVICE}. "
            "Nothing was deleted"
        )
    if others.behind_link is not None:
        folder, other = others.behind_link
        raise ConfigError(
            f"{folder} links into another output, {other}. {_ADVICE}. Nothing was deleted"
        )
    if others.above is not None:
        raise ConfigError(f"output.path {url} is inside another output, {others.above}. {_ADVICE}")


def _link_into_output(store: Store, keys: Iterable[str]) -> tuple[str, str] | None:
    root = Path(store.url).resolve()
    for folder in sorted({split_url(key)[0] for key in keys} - {"."}):
        real = (root / folder).resolve()
        if real.is_relative_to(root):
            continue
        target = open_store(str(real))
        is_output = target.stat(layout.JOB_KEY) is not None
        other = target.url if is_output else _output_above(target)
        if other is not None and Path(other) != root:
            return store.url_of(folder), other
    return None


def _output_above(store: Store) -> str | None:
    """The next folder above that is an output."""
    try:
        for parent in store.parents():
            if parent.stat(layout.JOB_KEY) is not None:
                return parent.url
    except ConfigError:  # often one may read only below a prefix
        pass
    return None


def read_origins(store: Store, keys: Iterable[str]) -> dict[str, Origin]:
    """What files below OUT say of themselves, by key in order."""
    names = sorted(keys)
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        return dict(zip(names, pool.map(lambda key: _origin(store, key), names), strict=True))


def _origin(store: Store, key: str) -> Origin:
    facts = read_facts(store, key)
    return Origin() if facts is None else Origin(facts.get("digest"), facts.get("shard"))


def refuse_foreign_files(url: str, origins: Mapping[str, Origin], digest: str) -> None:
    """A `.parquet` that is not ours must not be mistaken for a result, nor be among them."""
    for key in _not_of(origins, {digest}):
        raise ConfigError(
            f"{join_url(url, key)} is not a result of this job: choose an empty output.path, or "
            "move the file away"
        )


def refuse_strangers(url: str, origins: Mapping[str, Origin], digests: set[str]) -> None:
    """Files that are not results of this output stop a restart before it deletes anything.

    `digests`: of every job that this output has been computed for, those before a restart too.
    """
    if strangers := _not_of(origins, digests):
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise ConfigError(
            f"{join_url(url, strangers[0])}{more} is not a result of this output: move it "
            "away, or choose an empty output.path. Nothing was deleted"
        )


def _not_of(origins: Mapping[str, Origin], digests: set[str]) -> list[str]:
    return [
        key
        for key, origin in sorted(origins.items())
        if origin.digest not in digests or origin.shard != key
    ]
