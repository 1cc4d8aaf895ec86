"""Which files below OUT are this output's: only those are read as results, swept or deleted.

Must not know: leases, what is computed. Invariants: nothing here writes; a file is this output's if
its footer names a digest that this output has had and the shard at whose place it stands. Outputs
do not nest: what lies in a folder with a `_batchinfer` of its own is another's, also over a link.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.ledger import Survey, layout, read_facts, records
from batchinfer.source import Fingerprint
from batchinfer.storage import Store, open_store, split_url

_FOOTER_THREADS = 16
_ADVICE = "Choose an output.path that shares no folder with another output"


def refuse_other_outputs(store: Store, survey: Survey, shards: Iterable[str]) -> None:
    """Raise ConfigError if another output lies below OUT, or OUT would begin inside another.

    `shards`: names of the input's, whose finished files will stand at those places below OUT.
    """
    if survey.nested:
        raise ConfigError(
            f"{store.url_of(min(survey.nested))} is an output of its own and lies in output.path "
            f"{store.url}. {_ADVICE}. Nothing was deleted"
        )
    if store.is_local:
        _refuse_links_into_outputs(store, [*survey.finished, *shards])
    if store.stat(layout.JOB_KEY) is None and (other := _output_above(store)) is not None:
        raise ConfigError(f"output.path {store.url} lies in another output, {other}. {_ADVICE}")


def _refuse_links_into_outputs(store: Store, keys: Iterable[str]) -> None:
    root = Path(store.url).resolve()
    for folder in sorted({split_url(key)[0] for key in keys} - {"."}):
        real = (root / folder).resolve()
        if real.is_relative_to(root):
            continue
        target = open_store(str(real))
        is_output = target.stat(layout.JOB_KEY) is not None
        other = target.url if is_output else _output_above(target)
        if other is not None and Path(other) != root:
            raise ConfigError(
                f"{store.url_of(folder)} links into another output, {other}. {_ADVICE}. Nothing "
                "was deleted"
            )


def _output_above(store: Store) -> str | None:
    """The next folder above that is an output."""
    try:
        for parent in store.parents():
            if parent.stat(layout.JOB_KEY) is not None:
                return parent.url
    except ConfigError:  # often one may read only below a prefix
        pass
    return None


def refuse_foreign_files(
    store: Store, survey: Survey, recorded: Mapping[str, Fingerprint], digest: str
) -> None:
    """A `.parquet` that is not ours must not be mistaken for a result, nor be among them."""
    for key in sorted(survey.finished - recorded.keys()):
        if not _is_result(store, key, {digest}):
            raise ConfigError(
                f"{store.url_of(key)} is not a result of this job: choose an empty "
                "output.path, or move the file away"
            )


def refuse_strangers(store: Store, survey: Survey, digest: str) -> None:
    """Files that are no result of this output stop a restart before it deletes anything."""
    digests = {digest, *_earlier_digests(store)}
    keys = sorted(survey.finished)
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        are_ours = list(pool.map(lambda key: _is_result(store, key, digests), keys))
    strangers = [key for key, is_ours in zip(keys, are_ours, strict=True) if not is_ours]
    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise ConfigError(
            f"{store.url_of(strangers[0])}{more} is not a result of this output: move it "
            "away, or choose an empty output.path. Nothing was deleted"
        )


def _is_result(store: Store, key: str, digests: set[str]) -> bool:
    facts = read_facts(store, key)
    return facts is not None and facts.get("digest") in digests and facts.get("shard") == key


def _earlier_digests(store: Store) -> set[str]:
    """Of every job that this output has been computed for, those before a restart too."""
    keys = [layout.JOB_KEY, *(info.key for info in store.list(layout.RUNS_PREFIX))]
    found = (records.read_json(store, key) for key in keys)
    return {str(record["digest"]) for record in found if record is not None and "digest" in record}
