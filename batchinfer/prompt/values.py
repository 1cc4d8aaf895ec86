"""Arrow columns as plain Python values: text, numbers, lists and dicts, nothing else.

Must not know: templates. Times are text as Arrow writes them, decimals exact numbers, a map is a
list of [key, value]. Values are read column by column at any depth; only where a column fails are
they read one by one. Invariants: no object with methods of its own comes out, and whatever cannot
be read (bytes, times out of range, text that is not UTF-8) is a RowError, not an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import RowError
from batchinfer.prompt.numbers import ExactNumber

#: What a value has in place of a null, a NaN or bytes in it, made from what is wrong with it.
StandIn = Callable[[RowError], Any]

_MAX_REASON_CHARS = 200
_OUT_OF_RANGE = "<value out of range"  # how Arrow's text of such a time begins
_UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # digits of a second


class _Read(NamedTuple):
    values: list[Any]
    errors: dict[int, RowError]  # by index; what `values` has there means nothing


def column_values(column: pa.ChunkedArray) -> list[Any]:
    """One entry for each row: str, int, float, bool, list, dict, None (null) or a RowError."""
    return _rows(column, _Reader("", None))


def template_values(column: pa.ChunkedArray, name: str, stand_in: StandIn) -> list[Any]:
    """The same with `stand_in` for nulls, NaN and bytes, at any depth."""
    return _rows(column, _Reader(name, stand_in))


def why_unreadable(data_type: pa.DataType) -> str | None:
    """Why no value of this type can be read; None if one can, or a part of it."""
    reasons = [reason for _, reason in _leaves(data_type, "")]
    return None if not reasons or None in reasons else reasons[0]


def first_unreadable(data_type: pa.DataType) -> tuple[str, str] | None:
    """(where, why) of a part of this type that cannot be read."""
    return next(((path, why) for path, why in _leaves(data_type, "") if why), None)


def stored_type(data_type: pa.DataType) -> pa.DataType:
    """What values of this type are, without the way in which they are stored."""
    types = pa.types
    if types.is_dictionary(data_type) or types.is_run_end_encoded(data_type):
        return stored_type(data_type.value_type)
    if isinstance(data_type, pa.BaseExtensionType):
        if isinstance(data_type, pa.UuidType):
            return pa.string()
        is_bool = isinstance(data_type, pa.Bool8Type)
        return pa.bool_() if is_bool else stored_type(data_type.storage_type)
    return data_type


def is_list(data_type: pa.DataType) -> bool:
    types = pa.types
    kinds = (
        types.is_list,
        types.is_large_list,
        types.is_list_view,
        types.is_large_list_view,
        types.is_fixed_size_list,
    )
    return any(is_kind(data_type) for is_kind in kinds)


def _rows(column: pa.ChunkedArray, reader: _Reader) -> list[Any]:
    rows: list[Any] = []
    for chunk in column.chunks:
        values, errors = reader.read(chunk, "")
        for index, error in errors.items():
            values[index] = error
        rows = rows + values if rows else values
    return rows


class _Reader:
    def __init__(self, column: str, stand_in: StandIn | None) -> None:
        self._column = column
        self._stand_in = stand_in

    def read(self, array: pa.Array, path: str) -> _Read:
        """`path` is where in the column's values the array is, empty for the values themselves."""
        try:
            return self._read(array, path)
        except Exception as error:  # the values' edge: pyarrow raises what Python's types raise
            if len(array) == 1:
                return self._with_errors([None], {0: _reason(error)}, path)
        each = [self.read(array.slice(index, 1), path) for index in range(len(array))]
        errors = {i: error for i, read in enumerate(each) for error in read.errors.values()}
        return _Read([read.values[0] for read in each], errors)

    def _read(self, array: pa.Array, path: str) -> _Read:
        types, data_type = pa.types, array.type
        if isinstance(data_type, pa.UuidType):
            return self._leaf(array, path)
        if isinstance(data_type, pa.BaseExtensionType):
            is_bool = isinstance(data_type, pa.Bool8Type)
            return self.read(array.storage.cast(pa.bool_()) if is_bool else array.storage, path)
        if types.is_dictionary(data_type):
            return self.read(array.dictionary_decode(), path)
        if types.is_run_end_encoded(data_type):
            return self.read(pc.run_end_decode(array), path)
        if reason := _why_not(data_type):
            return self._unreadable(array, path, reason)
        if types.is_struct(data_type):
            return self._structs(array, path)
        if types.is_map(data_type):
            return self._maps(array, path)
        if is_list(data_type):
            return self._lists(array, path)
        return self._leaf(array, path)

    def _structs(self, array: pa.StructArray, path: str) -> _Read:
        names = [field.name for field in array.type]
        fields = [
            self.read(child, f"{path}.{name}" if path else name)
            for name, child in zip(names, array.flatten(), strict=True)
        ]
        values: list[Any]
        if fields:
            entries = zip(*(field.values for field in fields), strict=True)
            values = [dict(zip(names, entry, strict=True)) for entry in entries]
        else:
            values = [{} for _ in range(len(array))]
        errors = {i: error for field in fields for i, error in field.errors.items()}
        return self._with_nulls(array, path, _Read(values, errors))

    def _lists(self, array: pa.Array, path: str) -> _Read:
        edges, stored = _edges(array)
        first, size = int(edges[0]), int(edges[-1] - edges[0])
        flat = self.read(stored.slice(first, size), f"{path}[]")
        return self._with_nulls(array, path, _split(flat, edges - first))

    def _maps(self, array: pa.MapArray, path: str) -> _Read:
        edges = array.offsets.to_numpy()
        first, size = int(edges[0]), int(edges[-1] - edges[0])
        keys = self.read(array.keys.slice(first, size), f"{path}[].key")
        items = self.read(array.items.slice(first, size), f"{path}[].value")
        pairs = [list(pair) for pair in zip(keys.values, items.values, strict=True)]
        flat = _Read(pairs, keys.errors | items.errors)
        return self._with_nulls(array, path, _split(flat, edges - first))

    def _leaf(self, array: pa.Array, path: str) -> _Read:
        possible, impossible = array, dict[int, str]()
        if pa.types.is_temporal(array.type):
            possible, impossible = _without_impossible_times(array)
        values = _leaf_values(possible)
        if self._stand_in is None and pa.types.is_decimal(array.type):
            values = [None if value is None else str(value) for value in values]
        elif self._stand_in is not None and pa.types.is_floating(array.type):
            values = self._with_missing(values, [v != v for v in values], path, "NaN")
        return self._with_nulls(array, path, self._with_errors(values, impossible, path))

    def _with_errors(self, values: list[Any], reasons: dict[int, str], path: str) -> _Read:
        if self._stand_in is None:
            errors = {i: RowError("invalid_prompt", reason) for i, reason in reasons.items()}
            return _Read(values, errors)
        for index, reason in reasons.items():
            values[index] = self._in_place_of("invalid_prompt", path, f": {reason}")
        return _Read(values, {})

    def _unreadable(self, array: pa.Array, path: str, reason: str) -> _Read:
        if self._stand_in is not None:
            values = [self._in_place_of("invalid_prompt", path, f" {reason}")] * len(array)
            return self._with_nulls(array, path, _Read(values, {}))
        error = RowError("invalid_prompt", f"a part of it {reason}" if path else reason)
        errors = dict.fromkeys(range(len(array)), error)
        return self._with_nulls(array, path, _Read([None] * len(array), errors))

    def _with_nulls(self, array: pa.Array, path: str, read: _Read) -> _Read:
        """What is null is neither a value nor an error, whatever is stored there."""
        if array.null_count == 0:
            return read
        is_null = array.is_null().to_numpy(zero_copy_only=False)
        values = self._with_missing(read.values, is_null, path, "null")
        return _Read(values, {i: error for i, error in read.errors.items() if not is_null[i]})

    def _with_missing(
        self, values: list[Any], is_missing: Sequence[bool], path: str, what: str
    ) -> list[Any]:
        missing = self._stand_in and self._in_place_of("missing_value", path, f" is {what}")
        return [missing if gone else v for v, gone in zip(values, is_missing, strict=True)]

    def _in_place_of(self, kind: str, path: str, what: str) -> Any:
        assert self._stand_in is not None
        place = f"{path} of column {self._column!r}" if path else f"column {self._column!r}"
        return self._stand_in(RowError(kind, place + what))


def _edges(array: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Where the lists' entries begin and end in an array of them, which holds others, too."""
    types = pa.types
    if types.is_fixed_size_list(array.type):
        rows = array.offset + np.arange(len(array) + 1)
        return rows * array.type.list_size, array.values
    if types.is_list(array.type) or types.is_large_list(array.type):
        return array.offsets.to_numpy(), array.values
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths)]), pc.list_flatten(array)


def _split(flat: _Read, edges: npt.NDArray[np.int64]) -> _Read:
    """Entries as lists of those between two edges. An error of an entry is one of its list."""
    rows = np.searchsorted(edges, np.array(list(flat.errors), np.int64), side="right") - 1
    errors = dict(zip(rows.tolist(), flat.errors.values(), strict=True))
    return _Read([flat.values[low:high] for low, high in pairwise(edges.tolist())], errors)


def _leaf_values(array: pa.Array) -> list[Any]:
    """Values of a type that holds no others. Raises whatever pyarrow or Python does."""
    types, data_type = pa.types, array.type
    if isinstance(data_type, pa.UuidType):
        return [None if v is None else str(UUID(bytes=v)) for v in array.storage.to_pylist()]
    if types.is_duration(data_type):
        counts = array.cast(pa.int64()).to_pylist()
        return [None if v is None else _iso_duration(v, _UNITS[data_type.unit]) for v in counts]
    if types.is_temporal(data_type):
        return array.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    if types.is_decimal(data_type):
        texts = array.cast(pa.string()).to_pylist()
        return [None if text is None else ExactNumber(text) for text in texts]
    if types.is_float16(data_type):
        halves = array.cast(pa.float32()).to_pylist()
        return [None if v is None else float(str(np.float16(v))) for v in halves]
    if types.is_float32(data_type):  # 0.1, not the float64 next to the float32 next to 0.1
        return array.cast(pa.string()).cast(pa.float64()).to_pylist()  # type: ignore[no-any-return]
    return array.to_pylist()  # type: ignore[no-any-return]


def _iso_duration(count: int, digits: int) -> str:
    """`count` times 10 ** -digits seconds, such as PT1.5S."""
    seconds = format(ExactNumber(abs(count)).scaleb(-digits), "f")
    if "." in seconds:
        seconds = seconds.rstrip("0").rstrip(".")
    return f"{'-' if count < 0 else ''}PT{seconds}S"


def _without_impossible_times(array: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """With nulls in place of what Arrow has no text for, and what is wrong with those."""
    data_type = array.type
    if pa.types.is_duration(data_type):
        return array, {}
    # With a time zone Arrow does not look whether it is in range.
    is_zoned = pa.types.is_timestamp(data_type) and data_type.tz is not None
    local = array.cast(pa.timestamp(data_type.unit)) if is_zoned else array
    texts = local.cast(pa.string())
    is_bad = pc.fill_null(pc.starts_with(texts, _OUT_OF_RANGE), False)
    bad = np.flatnonzero(is_bad.to_numpy(zero_copy_only=False)).tolist()
    if not bad:
        return array, {}
    number = {i: texts[i].as_py().removeprefix(_OUT_OF_RANGE).strip(": >") for i in bad}
    reasons = {i: f"{data_type} {number[i]} is out of range" for i in bad}
    return pc.if_else(is_bad, pa.scalar(None, data_type), array), reasons


def _leaves(data_type: pa.DataType, path: str) -> Iterator[tuple[str, str | None]]:
    """(where, why it cannot be read) of each type that holds no others."""
    types, data_type = pa.types, stored_type(data_type)
    if (reason := _why_not(data_type)) or not types.is_nested(data_type):
        yield path, reason
    elif types.is_struct(data_type):
        for field in data_type:
            yield from _leaves(field.type, f"{path}.{field.name}" if path else field.name)
    elif types.is_map(data_type):
        yield from _leaves(data_type.key_type, f"{path}[].key")
        yield from _leaves(data_type.item_type, f"{path}[].value")
    else:
        yield from _leaves(data_type.value_type, f"{path}[]")


def _why_not(data_type: pa.DataType) -> str | None:
    """Why no value of this type can be read, whatever is in it."""
    types = pa.types
    is_binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
    if types.is_fixed_size_binary(data_type) or any(is_kind(data_type) for is_kind in is_binary):
        return f"is {data_type}, not text: write it as a string"
    if types.is_union(data_type) or types.is_interval(data_type):
        return f"is {data_type}, which cannot be in a prompt"
    if types.is_struct(data_type):
        names = [field.name for field in data_type]
        if twice := next((name for name in names if names.count(name) > 1), None):
            return f"has two fields called {twice!r}"
    if types.is_timestamp(data_type) and data_type.tz is not None:
        return _why_no_zone(data_type.tz)
    return None


@cache
def _why_no_zone(zone: str) -> str | None:
    try:
        pa.array([0], pa.timestamp("s", zone)).cast(pa.string())
    except pa.ArrowException:
        return f"has times in the time zone {zone!r}, which this machine does not know"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"the value is not valid UTF-8 text: {error.reason}"
    return f"the value cannot be read: {error}"[:_MAX_REASON_CHARS]
