"""Columns of an output as polars can have them: it lacks some of Arrow's types, and panics.

Must not know: files. Invariant: values stay what they are; instants are given in UTC where polars
does not know their zone (it has no offsets such as +05:30), and decimals of more digits than its
own as text.
"""

from __future__ import annotations

import pyarrow as pa

from batchinfer.errors import ConfigError

_MAX_DIGITS = 38


def schema_for_polars(schema: pa.Schema) -> pa.Schema:
    """The schema with types that polars has, without metadata.

    Raises ConfigError naming a column that it can have in no way.
    """
    import polars as pl

    fields = []
    for field in schema.remove_metadata():
        field = field.with_type(_for_polars(field.type))
        try:
            pl.from_arrow(pa.schema([field]).empty_table())
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise ConfigError(
                f"column {field.name!r} of the output is {field.type}, which polars cannot read "
                f"({error}): read the output's files with pyarrow"
            ) from error
        fields.append(field)
    return pa.schema(fields)


def batch_for_polars(batch: pa.RecordBatch) -> pa.Table:
    """The same rows in the types of `schema_for_polars`."""
    table = pa.Table.from_batches([batch])
    return table.cast(pa.schema([f.with_type(_for_polars(f.type)) for f in table.schema]))


def _for_polars(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_timestamp(kind) and kind.tz is not None and not _is_zone(kind.tz):
        return pa.timestamp(kind.unit, "UTC")
    if types.is_decimal256(kind):
        is_wide = kind.precision > _MAX_DIGITS
        return pa.string() if is_wide else pa.decimal128(kind.precision, kind.scale)
    if types.is_list(kind):
        return pa.list_(_inner(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_inner(kind.value_field), kind.list_size)
    if types.is_map(kind):
        return pa.map_(_inner(kind.key_field), _inner(kind.item_field))
    if types.is_struct(kind):
        return pa.struct([_inner(field) for field in kind])
    return kind


def _inner(field: pa.Field) -> pa.Field:
    return field.with_type(_for_polars(field.type))


def _is_zone(name: str) -> bool:
    import polars as pl

    try:
        pl.Series([], dtype=pl.Int64).cast(pl.Datetime("us", name))
    except pl.exceptions.PolarsError:
        return False
    return True
