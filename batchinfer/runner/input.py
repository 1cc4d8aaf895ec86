"""The input as this start finds it, beside what it was when rows of it were computed.

Reads the footers of shards that are new, and of those whose time alone has changed. Must not know:
leases, engines. Invariant: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.ledger import Survey, layout
from batchinfer.runner.carried import carried_columns, carried_schema
from batchinfer.runner.checks import check_schema, check_shards
from batchinfer.runner.decide import Resume
from batchinfer.runner.start import Start
from batchinfer.source import Fingerprint, Shard, read_footer, same_content


class InputChanged(InputError):
    """Results are there of other content than shards have now."""


@dataclass(frozen=True, slots=True)
class InputView:
    """The shards, compared with their records."""

    fingerprints: Mapping[str, Fingerprint]  # of every shard, by name
    new: Sequence[Fingerprint]  # those that no run's record has as they are now
    carried: pa.Schema | None  # the id and kept columns; None: each shard's own types
    #: Names of shards with results whose time alone has changed.
    rewritten: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Compared:
    """The shards beside their records, before any new one is read."""

    known: dict[str, Fingerprint]
    new: list[Fingerprint]  # of `known`, those that no run's record has as they are now
    unread: list[Shard]
    rewritten: list[str]


def look_at_input(start: Start, decision: Resume, survey: Survey) -> InputView:
    """Compare each shard with its record; read the footers of new ones, and settle on the types of
    the columns that are taken over.

    Raises InputError for shards that changed since their rows were computed, that cannot be read,
    or that lack what the job needs.
    """
    compared = _compare(start, decision, survey)
    checked = _read(start, compared.unread)
    schemas = zip(compared.unread, (schema for _, schema in checked), strict=True)
    carried = carried_schema(start.job, schemas, decision.record)
    read = [fingerprint for fingerprint, _ in checked]
    fingerprints = compared.known | {f.name: f for f in read}
    return InputView(fingerprints, compared.new + read, carried, compared.rewritten)


def refuse_changed(start: Start, decision: Resume, survey: Survey) -> None:
    """Raise InputError for shards that changed since their rows were computed."""
    _compare(start, decision, survey)


def _compare(start: Start, decision: Resume, survey: Survey) -> _Compared:
    compared = _Compared({}, [], [], [])
    changed: list[str] = []
    for shard in start.shards:
        has_results = shard.name in survey.finished or shard.name in survey.with_parts
        old = decision.known.get(shard.name)
        if old is None:
            compared.unread.append(shard)
        elif (old.size_bytes, old.version) == (shard.size_bytes, shard.version):
            compared.known[shard.name] = old
            if shard.name in decision.unrecorded:
                compared.new.append(old)
        elif same_content(old, shard):
            now = _fingerprint(shard, old.num_rows, old.footer_sha256)
            compared.known[shard.name] = now
            compared.new.append(now)
            if has_results:
                compared.rewritten.append(shard.name)
        elif has_results:
            changed.append(
                f"{shard.url}: {old.size_bytes} bytes then, {shard.size_bytes} bytes now"
            )
        else:
            compared.unread.append(shard)
    if changed:
        raise _changed(start, changed)
    return compared


def _read(start: Start, shards: Sequence[Shard]) -> list[tuple[Fingerprint, pa.Schema]]:
    def check(shard: Shard) -> tuple[Fingerprint, pa.Schema]:
        footer = read_footer(shard)
        check_schema(start.job, start.task, start.row_filter, shard, footer)
        fingerprint = _fingerprint(shard, footer.num_rows, footer.sha256)
        return fingerprint, carried_columns(start.job, footer)

    return check_shards(shards, check)


def _fingerprint(shard: Shard, num_rows: int, footer_sha256: str) -> Fingerprint:
    return Fingerprint(shard.name, shard.size_bytes, shard.version, num_rows, footer_sha256)


def _changed(start: Start, shards: Sequence[str]) -> InputChanged:
    return InputChanged(
        "these shards changed since their rows were computed:\n  "
        + "\n  ".join(shards[:20])
        + ("\n  …" if len(shards) > 20 else "")
        + "\nBring the old files back or use another output.path. To compute them again, and only "
        f"them, delete the files of these names below {start.store.url} and their folders below "
        f"{start.store.url_of(layout.PARTS_PREFIX)}, and start again"
    )
