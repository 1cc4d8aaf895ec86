"""The small JSON records of an output: job.json, runs/NNNN.json, _SUCCESS, and the digests in them.

Must not know: engines, threads. Each record has one writer and is created once, except `_SUCCESS`,
which is deleted before anything of a complete output may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.source import Fingerprint
from batchinfer.storage import Store


def to_json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """A record, None if it is not there. Raises ConfigError if it is not JSON of ours."""
    try:
        raw = store.read(key)
    except FileNotFoundError:
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ConfigError(
            f"{store.url_of(key)}: not a record of batchinfer (no JSON object). If the file "
            "was damaged, remove it and start with --restart, or choose another output.path"
        )
    return record


def digest_of(ingredients: Mapping[str, Any]) -> str:
    """sha256 over canonical JSON."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def listing_digest(shards: Iterable[tuple[str, int, str]]) -> str:
    """sha256 over (name, size, version) of every shard of the input, in order of name."""
    digest = hashlib.sha256()
    for name, size_bytes, version in shards:
        digest.update(f"{name}\0{size_bytes}\0{version}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Totals:
    """What a finished file, or all of them, hold."""

    rows: int = 0  # results: rows x samples
    rows_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # None: some of it was written by a version that did not count them.
    rows_cut: int | None = 0  # ended by sampling.max_tokens
    rows_unparsed: int | None = 0  # of a JSON schema: results that are no whole document

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.rows + other.rows,
            self.rows_failed + other.rows_failed,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            _sum(self.rows_cut, other.rows_cut),
            _sum(self.rows_unparsed, other.rows_unparsed),
        )

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Totals:
        return cls(
            rows=int(facts["rows"]),
            rows_failed=int(facts["rows_failed"]),
            prompt_tokens=int(facts["prompt_tokens"]),
            completion_tokens=int(facts["completion_tokens"]),
            rows_cut=facts.get("rows_cut"),
            rows_unparsed=facts.get("rows_unparsed"),
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def fingerprint_record(fingerprint: Fingerprint) -> list[Any]:
    """Compact form in runs/NNNN.json: [name, size, version, rows, footer hash]."""
    return [
        fingerprint.name,
        fingerprint.size_bytes,
        fingerprint.version,
        fingerprint.num_rows,
        fingerprint.footer_sha256,
    ]
