"""Hive folders: `day=2026-11-21/` above a file is a column `day` of it, as text.

Must not know: storage, how rows are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

Partitions = tuple[tuple[str, str], ...]

_NULL = "__HIVE_DEFAULT_PARTITION__"


def parse_partitions(folders: Iterable[str]) -> Partitions:
    """(name, value) of each folder `name=value`, unquoted, from the outermost in."""
    pairs = (folder.partition("=") for folder in folders)
    return tuple(
        (_unquoted(name), _unquoted(value)) for name, equals, value in pairs if name and equals
    )


def partition_value(value: str) -> pa.Scalar:
    """What the column of a folder's value holds."""
    return pa.scalar(None if value == _NULL else value, pa.string())


def says_other(value: str, column: pa.ChunkedArray) -> bool:
    """Whether a folder's value differs from any in the file's own column, in the column's type.

    Raises ValueError for a value that the type cannot have.
    """
    text = partition_value(value)
    if not text.is_valid:
        return bool(column.null_count < len(column))
    of_folder = _cast(text, column.type)
    differs = pc.not_equal(column, of_folder)
    return bool(pc.any(pc.fill_null(differs, True)).as_py())


def _cast(text: pa.Scalar, kind: pa.DataType) -> pa.Scalar:
    for spelling in _spellings(kind):
        try:
            value = text.cast(spelling)
            if pa.types.is_timestamp(kind) and kind.tz and not spelling.tz:
                value = pc.assume_timezone(value, kind.tz)
            return value.cast(kind)
        except pa.ArrowException:
            continue
    raise ValueError(f"{text.as_py()!r} is not a valid {kind}")


def _spellings(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Types whose text a folder may hold for a value of this type."""
    yield kind
    if pa.types.is_timestamp(kind):  # with more digits, or without the zone
        yield pa.timestamp("us", kind.tz)
        yield pa.timestamp("us")


def _unquoted(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:  # a % that quotes nothing
        return text
