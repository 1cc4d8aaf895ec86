"""Arrow types that a Parquet file can hold, and values of them from their whole range.

Values are what `pyarrow.array` takes; times are numbers, as Python's own end at the year 9999.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

_TEXTS = (
    "",
    " ",
    "a",
    "word word",
    "0",
    "null",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "<|im_end|>",
    "<|endoftext|>",
    "line\nline\r\n\tx",
    "Grüße, 你好 👩‍👩‍👧",
    "a\x00b",
    "\ufeff\u202e\u2028",
    '{"role": "user", "content": "hi"}',
    '[{"role": "user", "content": "hi"}]',
    "__HIVE_DEFAULT_PARTITION__",
    "word " * 300,
)
_BYTES = (b"", b"a", b"\xff\xfe", b"\x00" * 16, "é".encode(), b"\x80abc", b"PAR1")
_REALS = (0.0, -0.0, 1.5, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 0.1, 1e16)
_UNITS = ("s", "ms", "us", "ns")
_ZONES = (None, "UTC", "Europe/Berlin", "+05:30", "America/New_York", "Pacific/Apia")

texts = st.sampled_from(_TEXTS) | st.text(max_size=8)
_names = st.sampled_from(("a", "b", "role", "content", "x y", "items", "")) | st.text(max_size=4)


def _integers(bits: int, *, is_signed: bool = True) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    return st.sampled_from((0, 1, 2, low, high)) | st.integers(low, high)


def _decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    digits = st.sampled_from((0, 1, -1, 150, 10**precision - 1, 1 - 10**precision))
    return digits.map(lambda n: Decimal((n < 0, tuple(map(int, str(abs(n)))), -scale)))


_LEAVES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.null(): st.none(),
    pa.bool_(): st.booleans(),
    pa.float16(): st.sampled_from(_REALS),
    pa.float32(): st.sampled_from(_REALS),
    pa.float64(): st.sampled_from(_REALS) | st.floats(),
    pa.string(): texts,
    pa.large_string(): texts,
    pa.string_view(): texts,
    pa.binary(): st.sampled_from(_BYTES),
    pa.large_binary(): st.sampled_from(_BYTES),
    pa.binary_view(): st.sampled_from(_BYTES),
    pa.binary(1): st.sampled_from((b"\x00", b"a", b"\xff")),
    pa.binary(16): st.sampled_from((b"\x00" * 16, uuid.UUID(int=7).bytes, b"\xff" * 16)),
    pa.date32(): _integers(32),
    pa.date64(): st.sampled_from((0, 86_400_000, -86_400_000, 253402300800000, 86_400_000 * 10**9)),
    pa.time32("s"): st.integers(0, 86_399),
    pa.time32("ms"): st.integers(0, 86_399_999),
    pa.time64("us"): st.integers(0, 86_399_999_999),
    pa.time64("ns"): st.sampled_from((0, 1, 999, 86_399_999_999_999)),
}
for _bits in (8, 16, 32, 64):
    _LEAVES[getattr(pa, f"int{_bits}")()] = _integers(_bits)
    _LEAVES[getattr(pa, f"uint{_bits}")()] = _integers(_bits, is_signed=False)
for _precision, _scale in ((5, 2), (18, 0), (38, 10), (38, -3), (4, 4)):
    _LEAVES[pa.decimal128(_precision, _scale)] = _decimals(_precision, _scale)
_LEAVES[pa.decimal32(7, 2)] = _decimals(7, 2)
_LEAVES[pa.decimal64(18, 6)] = _decimals(18, 6)
_LEAVES[pa.decimal256(76, 38)] = _decimals(76, 38)
for _unit in _UNITS:
    _LEAVES[pa.duration(_unit)] = _integers(64)
    for _zone in _ZONES:
        _LEAVES[pa.timestamp(_unit, _zone)] = st.sampled_from(
            (0, 1_700_000_000, -1, 1_700_000_000_123_456_789)
        ) | _integers(64)

_TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
)
_INTEGERS = [data_type for data_type in _LEAVES if pa.types.is_integer(data_type)]
leaf_types = st.sampled_from(list(_LEAVES))
text_types = st.sampled_from(_TEXT_TYPES)
_flat_types = st.sampled_from(_TEXT_TYPES) | st.sampled_from(_INTEGERS) | leaf_types


@st.composite
def types(draw: st.DrawFn, depth: int = 2) -> pa.DataType:
    """A type, nested `depth` levels at most."""
    kind = draw(
        st.sampled_from(
            ("flat", "flat", "flat", "dictionary", "extension", "list", "struct", "map")
            if depth
            else ("flat",)
        )
    )
    if kind == "flat":
        return draw(_flat_types)
    if kind == "dictionary":
        indices = draw(st.sampled_from((pa.int8(), pa.int32(), pa.uint16())))
        return pa.dictionary(indices, draw(_flat_types))
    if kind == "extension":
        made = draw(st.sampled_from(("uuid", "json", "bool8", "opaque")))
        if made == "opaque":
            return pa.opaque(draw(types(depth - 1)), "t", "v")
        return {"uuid": pa.uuid, "json": pa.json_, "bool8": pa.bool8}[made]()
    if kind == "list":
        inner = draw(types(depth - 1))
        make = draw(
            st.sampled_from(
                (pa.list_, pa.list_, pa.large_list, pa.list_view, pa.large_list_view, 2, 0)
            )
        )
        return pa.list_(inner, make) if isinstance(make, int) else make(inner)
    if kind == "struct":
        names = draw(st.lists(_names, min_size=1, max_size=3, unique=True))
        return pa.struct([(name, draw(types(depth - 1))) for name in names])
    return pa.map_(draw(_flat_types.filter(lambda key: key != pa.null())), draw(types(depth - 1)))


def values(data_type: pa.DataType) -> st.SearchStrategy[Any]:
    """Values of a type; nulls at any depth but in keys of maps."""
    return _values(data_type) | st.none()


def _values(data_type: pa.DataType) -> st.SearchStrategy[Any]:
    kinds = pa.types
    if isinstance(data_type, pa.BaseExtensionType):
        return _values(data_type.storage_type)
    if kinds.is_dictionary(data_type):
        return _values(data_type.value_type)
    if kinds.is_fixed_size_list(data_type):
        size = data_type.list_size
        return st.lists(values(data_type.value_type), min_size=size, max_size=size)
    if kinds.is_struct(data_type):
        return st.fixed_dictionaries({field.name: values(field.type) for field in data_type})
    if kinds.is_map(data_type):
        keys = _values(data_type.key_type)
        return st.lists(st.tuples(keys, values(data_type.item_type)), max_size=2)
    if kinds.is_nested(data_type):
        return st.lists(values(data_type.value_type), max_size=3)
    return _LEAVES[data_type]


def array(entries: Sequence[Any], data_type: pa.DataType) -> pa.Array:
    """An array of a type. Raises pa.ArrowException or the like for what pyarrow cannot make."""
    if isinstance(data_type, pa.BaseExtensionType):
        storage = array(entries, data_type.storage_type)
        return pa.ExtensionArray.from_storage(data_type, storage)
    if pa.types.is_dictionary(data_type):
        return pa.array(entries, data_type.value_type).dictionary_encode().cast(data_type)
    return pa.array(entries, data_type)
