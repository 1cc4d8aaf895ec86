"""Arrow columns as plain Python values for templates: text, numbers, lists and dicts, nothing else.

Must not know: templates. Invariant: no object with methods of its own reaches a template, and a
value that cannot be read (bytes that are not UTF-8) is a RowError in the list, not an exception.
"""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchinfer.errors import RowError

_ISO = (dt.date, dt.time)  # datetime is a date


def column_values(column: pa.ChunkedArray) -> list[Any]:
    """One entry for each row: str, int, float, bool, list, dict, None (null) or a RowError."""
    types = pa.types
    if types.is_temporal(column.type) or types.is_decimal(column.type):
        return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(scalar) for scalar in column]
    if not types.is_nested(column.type) and not types.is_binary(column.type):
        return values
    return [value if isinstance(value, RowError) else _plain_or_error(value) for value in values]


def _decoded(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RowError("invalid_prompt", f"the value is not valid UTF-8 text: {error.reason}")


def _plain_or_error(value: Any) -> Any:
    try:
        return _plain(value)
    except RowError as error:
        return error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, _ISO):
        return value.isoformat()
    if isinstance(value, Decimal | dt.timedelta):
        return str(value)
    raise RowError(
        "invalid_prompt", f"a value of type {type(value).__name__} cannot be in a prompt"
    )
