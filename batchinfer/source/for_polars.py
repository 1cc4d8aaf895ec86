"""Arrow's types as those that polars has: of some it has none, and panics when it meets one.

Must not know: columns, files. Invariant: values stay what they are. Instants are given in UTC where
polars does not know their zone: it has no offsets such as +05:30.
"""

from __future__ import annotations

import pyarrow as pa

_MAX_DIGITS = 38


def type_for_polars(kind: pa.DataType, otherwise: pa.DataType | None = None) -> pa.DataType:
    """What polars is given a plain type as. `otherwise`: what decimals of too many digits are; then
    instants of zones that nobody knows are in UTC, too.

    Raises ValueError for those without `otherwise`.
    """
    types = pa.types

    def inner(field: pa.Field) -> pa.Field:
        return field.with_type(type_for_polars(field.type, otherwise))

    if types.is_timestamp(kind) and kind.tz is not None:
        if kind.tz[:1] in ("+", "-") or kind.tz == "Z":
            return pa.timestamp(kind.unit, "UTC")
        if not _is_zone(kind.tz):
            if otherwise is None:
                raise ValueError(f"{kind} has a time zone that polars does not know")
            return pa.timestamp(kind.unit, "UTC")
    if types.is_decimal256(kind):
        if kind.precision <= _MAX_DIGITS:
            return pa.decimal128(kind.precision, kind.scale)
        if otherwise is None:
            raise ValueError(
                f"{kind} has no equivalent in polars, which has decimals of up to 38 digits"
            )
        return otherwise
    if types.is_list(kind):
        return pa.list_(inner(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field))
    if types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    return kind


def _is_zone(name: str) -> bool:
    import polars as pl

    try:
        pl.Series([], dtype=pl.Int64).cast(pl.Datetime("us", name))
    except pl.exceptions.PolarsError:
        return False
    return True
