"""Which settings name columns of the input, and what such a column holds.

The fields' own marks (`reads_column`) are the only place that says so. Must not know: any
setting, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel

from batchinfer.config.job import Job
from batchinfer.config.problems import submodel


class ColumnSetting(NamedTuple):
    """`data_type` and `description` of the columns that the setting `key` names."""

    key: str  # dotted
    data_type: str
    description: str


def column_settings() -> list[ColumnSetting]:
    """In the order of the job file."""
    return list(_walk(Job, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[ColumnSetting]:
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and isinstance(mark := extra.get("reads_column"), list):
            yield ColumnSetting(f"{prefix}{name}", *map(str, mark))
        elif (inner := submodel(field.annotation)) is not None:
            yield from _walk(inner, f"{prefix}{name}.")
