"""Types of columns that an output takes over: what stays of a file's type, and one type for a
column that several files wrote in different ones.

Must not know: files. Invariant: every value of a type is a value of its common type with another,
but for integers of 64 bits beside floats: one of more than 53 bits is refused when it is cast.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from batchinfer.source.plain import plain_type

_Rule = Callable[[pa.DataType, pa.DataType], pa.DataType | None]

_EXTENSION = b"ARROW:extension:"  # in a field's metadata: a type that pyarrow does not know
_UNITS = ("s", "ms", "us", "ns")
#: Bits of an integer -> bits of the smallest float that holds all such integers. Of 64 bits none
#: does, but pandas makes a column double where it has a null: files of one table have both.
_FLOAT_BITS = {8: 16, 16: 32, 32: 64, 64: 64}
_FLOATS = {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}  # bits of an integer -> its most digits
_MAX_DIGITS = 38  # of a decimal that polars and others can read


def output_field(name: str, field: pa.Field) -> pa.Field:
    """A column of an output for a column of a file."""
    kept = {
        key: value for key, value in (field.metadata or {}).items() if key.startswith(_EXTENSION)
    }
    return pa.field(name, output_type(field.type), metadata=kept or None)


def output_type(kind: pa.DataType) -> pa.DataType:
    """The type without how it was stored (dictionary, view, large offsets); UUID and the like stay.

    Names inside lists are Arrow's own, and everything may be null.
    """
    types = pa.types
    if isinstance(kind, pa.JsonType):
        return pa.json_(pa.string())
    if isinstance(kind, pa.BaseExtensionType):
        return (
            kind
            if plain_type(kind.storage_type) == kind.storage_type
            else output_type(kind.storage_type)
        )
    if types.is_fixed_size_list(kind):
        return pa.list_(_item(kind), kind.list_size)
    if types.is_map(kind):
        return pa.map_(output_type(kind.key_type), output_type(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([output_field(field.name, field) for field in kind])
    kind = plain_type(kind)
    return pa.list_(_item(kind)) if types.is_list(kind) else kind


def common_field(one: pa.Field, other: pa.Field) -> pa.Field | None:
    """A column for the values of two columns of an output; None if no type has both."""
    kind = common_type(one.type, other.type)
    if kind is None:
        return None
    is_same = one.metadata == other.metadata or pa.types.is_null(other.type)
    if pa.types.is_null(one.type):
        return other.with_name(one.name)
    return pa.field(one.name, kind, metadata=one.metadata if is_same else None)


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The smallest type that has the values of both (of `output_type`), None if there is none.

    Of nanoseconds and a coarser unit it is microseconds: no type has the digits of the one and the
    years of the other.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if isinstance(one, pa.BaseExtensionType) or isinstance(other, pa.BaseExtensionType):
        return common_type(_storage(one), _storage(other))
    rules: tuple[_Rule, ...] = (_numbers, _decimals, _times, _binaries, _lists, _structs, _maps)
    return next((found for rule in rules if (found := rule(one, other)) is not None), None)


def takes(kind: pa.DataType, other: pa.DataType) -> bool:
    """Whether a column of type `kind` may be given values of type `other`. Nanoseconds may be given
    coarser times, of years that they have.
    """
    if common_type(kind, other) == kind:
        return True
    coarser = _in_microseconds(kind)
    return bool(common_type(coarser, _in_microseconds(other)) == coarser)


def is_finer(kind: pa.DataType, other: pa.DataType) -> bool:
    """Whether both are instants, or both durations, and `kind` has more digits."""
    for is_kind in (pa.types.is_timestamp, pa.types.is_duration):
        if is_kind(kind) and is_kind(other):
            return bool(_UNITS.index(kind.unit) > _UNITS.index(other.unit))
    return False


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if types.is_struct(kind):
        return pa.struct([f.with_type(_in_microseconds(f.type)) for f in kind])
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    return kind


def _item(kind: pa.DataType) -> pa.Field:
    return output_field("item", kind.value_field)


def _storage(kind: pa.DataType) -> pa.DataType:
    return output_type(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if types.is_integer(one) and types.is_integer(other):
        if types.is_signed_integer(one) == types.is_signed_integer(other):
            return max(one, other, key=lambda kind: kind.bit_width)
        signed, unsigned = sorted((one, other), key=types.is_unsigned_integer)
        bits = max(signed.bit_width, 2 * unsigned.bit_width)
        return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits)
    if not all(types.is_integer(kind) or types.is_floating(kind) for kind in (one, other)):
        return None
    bits = max(
        _FLOAT_BITS[k.bit_width] if types.is_integer(k) else k.bit_width for k in (one, other)
    )
    return _FLOATS.get(bits)


def _decimals(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_decimal(one) or pa.types.is_decimal(other)):
        return None
    whole = scale = 0
    for kind in (one, other):
        if pa.types.is_decimal(kind):
            whole, scale = max(whole, kind.precision - kind.scale), max(scale, kind.scale)
        elif pa.types.is_integer(kind):
            whole = max(whole, _DIGITS[kind.bit_width])
        else:
            return None
    return pa.decimal128(whole + scale, scale) if whole + scale <= _MAX_DIGITS else None


def _times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if types.is_date(one) and types.is_date(other):
        return pa.date32()
    for is_kind in (types.is_timestamp, types.is_time, types.is_duration):
        if is_kind(one) and is_kind(other):
            unit = max(one.unit, other.unit, key=_UNITS.index)
            break
    else:
        return None
    if unit == "ns" and one.unit != other.unit and not types.is_time(one):
        unit = "us"  # nanoseconds end in 2262, and 9999-12-31 is common
    if types.is_duration(one):
        return pa.duration(unit)
    if types.is_time(one):
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    if (one.tz is None) != (other.tz is None):
        return None
    return pa.timestamp(unit, one.tz if one.tz == other.tz else "UTC")


def _binaries(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    are_binary = [pa.types.is_binary(k) or pa.types.is_fixed_size_binary(k) for k in (one, other)]
    return pa.binary() if all(are_binary) else None


def _lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if not all(types.is_list(kind) or types.is_fixed_size_list(kind) for kind in (one, other)):
        return None
    item = common_field(one.value_field, other.value_field)
    if item is None:
        return None
    sizes = {kind.list_size if types.is_fixed_size_list(kind) else -1 for kind in (one, other)}
    return pa.list_(item, sizes.pop() if len(sizes) == 1 else -1)


def _structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Fields by name; one that a side lacks is null there."""
    if not all(pa.types.is_struct(kind) for kind in (one, other)):
        return None
    fields = {field.name: field for field in one}
    if len(fields) < one.num_fields or len({field.name for field in other}) < other.num_fields:
        return None
    for field in other:
        common = common_field(fields[field.name], field) if field.name in fields else field
        if common is None:
            return None
        fields[field.name] = common
    return pa.struct(list(fields.values()))


def _maps(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not all(pa.types.is_map(kind) for kind in (one, other)):
        return None
    key = common_type(one.key_type, other.key_type)
    item = common_type(one.item_type, other.item_type)
    return None if key is None or item is None else pa.map_(key, item)
