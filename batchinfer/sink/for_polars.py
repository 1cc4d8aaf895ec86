"""Columns of an output as polars can have them; decimals of more digits than its own are text.

Must not know: files.
"""

from __future__ import annotations

import pyarrow as pa

from batchinfer.errors import ConfigError
from batchinfer.source import type_for_polars


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
    return type_for_polars(kind, otherwise=pa.string())
