"""Which settings decide what is in an output, and what a job, new or recorded, says of them.

The fields' own marks (`decides_results`) are the only place that says so: digests, refusals,
the JSON Schema and a test of the documentation come from here. Must not know: models, engines,
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from batchinfer.config.job import Job
from batchinfer.config.problems import submodel
from batchinfer.config.section import DecidesBy
from batchinfer.config.values import thaw


def deciding_keys() -> dict[str, DecidesBy]:
    """The dotted key of every setting that decides results, and by what."""
    return {key: by for key, by, _ in _walk(Job, {}, "", None)}


def deciding_values(job: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> plain value, of the settings that decide by their value.

    `job` is a Job as plain data, perhaps of an earlier version: what it does not name is at its
    default, so a key comes in with a default that computes what was computed without it, and a
    default does not change later.
    """
    return {key: value for key, by, value in _walk(Job, job, "", None) if by == "value"}


def without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `deciding_values` that are not at their default."""
    defaults = deciding_values({})
    return {key: value for key, value in values.items() if value != defaults.get(key)}


def _walk(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str, outer: DecidesBy | None
) -> Iterator[tuple[str, DecidesBy, Any]]:
    """(dotted key, by what, value) of every marked setting; a section's mark holds below it."""
    for name, field in model.model_fields.items():
        by = _mark(field) or outer
        inner = submodel(field.annotation)
        if inner is not None:
            yield from _walk(inner, values.get(name) or {}, f"{prefix}{name}.", by)
        elif by is not None:
            yield prefix + name, by, _value(field, name, values)


def _mark(field: FieldInfo) -> DecidesBy | None:
    extra = field.json_schema_extra
    return (
        cast("DecidesBy | None", extra.get("decides_results")) if isinstance(extra, dict) else None
    )


def _value(field: FieldInfo, name: str, values: Mapping[str, Any]) -> Any:
    """As in JSON; entries of a list of sections have all their keys."""
    if name not in values:
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        return thaw(default)
    value = thaw(values[name])
    entry = submodel(field.annotation, in_lists=True)
    if entry is None or not isinstance(value, list):
        return value
    return [
        {key: _value(inner, key, given) for key, inner in entry.model_fields.items()}
        for given in value
    ]
