"""Completions to Arrow to Parquet.

Must not know: when something is committed, or where it is stored.
"""

from batchinfer.sink.for_polars import batch_for_polars, schema_for_polars
from batchinfer.sink.parquet import FACTS_KEY, file_facts, part_writer, write_table
from batchinfer.sink.schema import output_columns, output_schema
from batchinfer.sink.table import build_table

__all__ = [
    "FACTS_KEY",
    "batch_for_polars",
    "build_table",
    "file_facts",
    "output_columns",
    "output_schema",
    "part_writer",
    "schema_for_polars",
    "write_table",
]
