"""What decides the content of an output, and the digests that tell one such job from another.

Invariants: an output keeps the digest that it was begun with. Whether a job may continue it is
asked of values, not of digests: those of job.json, completed with today's defaults, beside the
job's own. So neither a new setting at its default nor a better rule of what decides refuses an
older output, and neither lets another value pass.

Must not know: storage, leases, what is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchinfer.config import ENGINES, Job, deciding_values, without_defaults
from batchinfer.engine.kinds import engine_kind
from batchinfer.ledger import records
from batchinfer.model import ModelFacts
from batchinfer.sink.schema import SCHEMA_VERSION
from batchinfer.source import Shard

_ENGINE, _OPTIONS = "engine.name", "engine.options"
_MODEL_FACTS = ("dtype", "quantization", "max_model_len", "content")
_MAX_CHARS = 60


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides the content of an output. Everything else may change between runs."""

    settings: Mapping[str, Any]  # dotted key -> value, of all that decide by their value
    model: Mapping[str, Any]  # what the others are on this machine: _MODEL_FACTS

    @property
    def ingredients(self) -> dict[str, Any]:
        """What the digest is of. A setting at its default is not in it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": without_defaults(self.settings),
            "model": dict(self.model),
        }

    @property
    def digest(self) -> str:
        return records.digest_of(self.ingredients)

    def changes_since(self, record: Mapping[str, Any]) -> list[str]:
        """Dotted names of what differs from a job.json, each with both values.

        Its `job` is asked before its ingredients: it has every setting of the run that began
        the output, also those that its version did not count as deciding.
        """
        was = record["ingredients"]
        settings = _deciding(record["job"])
        # Of a later version: this one neither knows the setting nor what computes without it.
        settings |= {k: v for k, v in was.get("settings", {}).items() if k not in settings}
        return [
            *_changes(was["schema_version"], SCHEMA_VERSION, "schema_version"),
            *_changes(settings, self.settings, ""),
            *map(_of_adapters, _changes(_facts(was["model"]), self.model, "model")),
        ]


def identity_of(job: Job, model: ModelFacts) -> Identity:
    return Identity(
        settings=_deciding(job.model_dump(mode="json")),
        model={
            "dtype": model.dtype,
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,  # decides what is too long, and what is cut
            "content": dict(model.digest),
        },
    )


def complete_digest(digest: str, shards: Sequence[Shard]) -> str:
    """What `_SUCCESS` holds: the job and the input listing together."""
    return records.digest_of(
        {
            "job": digest,
            "input": records.listing_digest((s.name, s.size_bytes, s.version) for s in shards),
        }
    )


def _deciding(job: Mapping[str, Any]) -> dict[str, Any]:
    values = deciding_values(job)
    if (engine := values[_ENGINE]) in ENGINES:  # one that a later version has names what it names
        values[_OPTIONS] = engine_kind(engine).deciding_options(values[_OPTIONS])
    return values


def _changes(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{path}.{name}" if path else name
            yield from _changes(old.get(name, _NOT_GIVEN), new.get(name, _NOT_GIVEN), inner)
    elif _shown(old) != _shown(new):  # as text: 1 and true are equal in Python
        was, now = _shown(old), _shown(new)
        start = 0
        if len(was) > _MAX_CHARS or len(now) > _MAX_CHARS:
            same = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), 0)
            start = max(0, same - _MAX_CHARS // 2)
        yield f"{path}: was {_cut(was, start)}, is {_cut(now, start)}"


def _facts(model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: model.get(name) for name in _MODEL_FACTS}


def _of_adapters(change: str) -> str:
    """The same, where it is the content of an adapter, by the setting that names the adapter."""
    found = _ADAPTER.match(change)
    if found is None:
        return change
    key = f"model.adapters.{found['name']}" if found["name"] else "model.lora"
    return f"{key}: {found['file']} is another than the output was begun with"


#: A change of two sums, as what is not given has none.
_ADAPTER = re.compile(
    r"model\.content\.(?:adapters/(?P<name>.+)/)?lora/(?P<file>[^/:]+): was \"\S+ is \"\S+$"
)
_NOT_GIVEN = object()


def _shown(value: Any) -> str:
    if value is _NOT_GIVEN:
        return "not given"
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _cut(text: str, start: int) -> str:
    """`text` from `start` on, with marks where something is missing."""
    end = start + _MAX_CHARS
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")
