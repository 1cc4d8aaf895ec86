"""The small JSON records of an output: job.json, runs/NNNN.json, _SUCCESS, and the digests in them.

Must not know: engines, threads. Each record has one writer and is created once, except `_SUCCESS`,
which is deleted before anything of a complete output may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import UnionType
from typing import Any, NoReturn

from batchinfer.config import Job
from batchinfer.config.section import Section
from batchinfer.errors import ConfigError
from batchinfer.ledger.layout import JOB_KEY, STATUS_PREFIX, SUCCESS_KEY
from batchinfer.source import Fingerprint
from batchinfer.storage import Store
from batchinfer.tasks import counts_in


def to_json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


#: What each kind of record has at least, with its type: whoever reads one may rely on that. Where
#: null may stand, records of other versions may have nothing.
_INT = int | None
_NUMBER = int | float | None
_JOB = {"digest": str, "window_rows": int, "first_run": int, "job": dict, "ingredients": dict}
_SUCCESS = dict.fromkeys(["rows", "rows_failed", "prompt_tokens", "shards"], int) | {"digest": str}
_RUN = {"input": list, "options": dict}
_STATUS: Mapping[str, type | UnionType] = dict.fromkeys(
    ["state", "slice", "phase", "updated_at"], str
) | {
    "run": int,
    "holder": dict,
    "rows_done_at_start": int,
    "rows_durable": int,
    "rows_failed": _INT,
    "rows_total": _INT,
    "tokens_per_s": _NUMBER,
    "eta_s": _NUMBER,
}


#: Of a job: the keys below which there are others.
_SECTIONS = tuple(
    name
    for name, field in Job.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)


def read_job(store: Store) -> dict[str, Any] | None:
    """job.json, None if it is not there. Raises ConfigError for a damaged one."""
    record = read_json(store, JOB_KEY, _JOB)
    if record is not None and not (is_job_record(record) and _has_sections(record["job"])):
        raise _damaged(store, JOB_KEY)
    return record


def read_job_to_look(store: Store) -> dict[str, Any] | None:
    """As `read_job`, for those who only look at results: no more than the job has to be there."""
    record = read_json(store, JOB_KEY, {"job": dict})
    if record is not None and not _has_sections(record["job"]):
        raise _damaged(store, JOB_KEY)
    return record


def read_success(store: Store) -> dict[str, Any] | None:
    """As `read_job`, of `_SUCCESS`."""
    return read_json(store, SUCCESS_KEY, _SUCCESS)


def read_run(store: Store, key: str) -> dict[str, Any] | None:
    """As `read_job`, of a run."""
    return read_json(store, key, _RUN)


def read_status(store: Store, key: str) -> dict[str, Any] | None:
    """As `read_job`, of a run's status."""
    record = read_json(store, key, _STATUS)
    if record is not None and not (
        _is_time(record["updated_at"]) and {"host", "pid"} <= record["holder"].keys()
    ):
        raise _damaged(store, key)
    return record


def require_job(store: Store) -> dict[str, Any]:
    """The output's job.json. Raises ConfigError where there is none."""
    job = read_job_to_look(store)
    if job is None:
        raise ConfigError(f"{store.url} is not an output of batchinfer: no {JOB_KEY} in it")
    return job


def newest_statuses(store: Store) -> list[dict[str, Any]]:
    """The status of the newest run of each slice, in the order of run numbers."""
    newest: dict[str, dict[str, Any]] = {}
    for info in store.list(STATUS_PREFIX):  # by run number
        if (record := read_status(store, info.key)) is not None:
            newest[record["slice"]] = record
    return sorted(newest.values(), key=lambda record: int(record["run"]))


def read_json(
    store: Store, key: str, fields: Mapping[str, type | UnionType] | None = None
) -> dict[str, Any] | None:
    """A record, None if it is not there. Raises ConfigError if it is not JSON with the fields."""
    try:
        raw = store.read(key)
    except FileNotFoundError:
        return None
    try:
        record = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise _damaged(store, key)
    if not all(isinstance(record.get(name), kind) for name, kind in (fields or {}).items()):
        raise _damaged(store, key)
    return record


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # and could not be written again


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return False
    return True


def _damaged(store: Store, key: str) -> ConfigError:
    return ConfigError(
        f"{store.url_of(key)} is damaged: it is not what batchinfer writes there. Remove it and "
        "start again: results are kept, and its content is recovered from them"
    )


def _has_sections(job: Mapping[str, Any]) -> bool:
    """Whether what it has of a job is of the form of one: readers take sections out of it."""
    sections = {name: job.get(name) or {} for name in _SECTIONS}
    if not isinstance(job.get("task", ""), str):
        return False
    if not all(isinstance(section, Mapping) for section in sections.values()):
        return False
    kept = sections["input"].get("keep_columns") or []
    return (
        isinstance(sections["model"].get("path", ""), str)
        and isinstance(sections["engine"].get("options") or {}, Mapping)
        and isinstance(kept, list)
        and all(isinstance(name, str) for name in kept)
    )


def is_job_record(record: Mapping[str, Any]) -> bool:
    """Whether it says which job, as job.json does: a record may be damaged and still be JSON."""
    ingredients = record.get("ingredients")
    return (
        isinstance(record.get("digest"), str)
        and isinstance(record.get("job"), Mapping)
        and isinstance(ingredients, Mapping)
        and "schema_version" in ingredients
        and isinstance(ingredients.get("model"), Mapping)
        and isinstance(ingredients.get("settings", {}), Mapping)
    )


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
    #: What the task counts, by name. None: some of it was written by a version that did not.
    counts: Mapping[str, int | None] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        names = dict.fromkeys([*self.counts, *other.counts])
        return Totals(
            self.rows + other.rows,
            self.rows_failed + other.rows_failed,
            self.prompt_tokens + other.prompt_tokens,
            {name: _sum(self.counts.get(name, 0), other.counts.get(name, 0)) for name in names},
        )

    def as_dict(self) -> dict[str, int | None]:
        return {
            "rows": self.rows,
            "rows_failed": self.rows_failed,
            "prompt_tokens": self.prompt_tokens,
            **self.counts,
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Totals:
        """From a footer or `_SUCCESS`."""
        return cls(
            rows=int(facts["rows"]),
            rows_failed=int(facts["rows_failed"]),
            prompt_tokens=int(facts["prompt_tokens"]),
            counts={name: facts.get(name) for name in counts_in(facts)},
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def fingerprint_from(record: Any) -> Fingerprint | None:
    """Read from its compact form; None if that is damaged."""
    kinds = (str, int, str, int, str)
    is_whole = isinstance(record, list) and len(record) == len(kinds)
    is_whole = is_whole and all(map(isinstance, record, kinds))
    return Fingerprint(*record) if is_whole and min(record[1], record[3]) >= 0 else None


def fingerprint_record(fingerprint: Fingerprint) -> list[Any]:
    """Compact form in runs/NNNN.json: [name, size, version, rows, footer hash]."""
    return [
        fingerprint.name,
        fingerprint.size_bytes,
        fingerprint.version,
        fingerprint.num_rows,
        fingerprint.footer_sha256,
    ]
