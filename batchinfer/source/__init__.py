"""The input: which shards there are, what is in them, and their rows as Arrow blocks."""

from batchinfer.source.casts import cast_column, cast_table
from batchinfer.source.filters import RowFilter
from batchinfer.source.fingerprints import Fingerprint, same_content
from batchinfer.source.footer import Footer, RowGroup, check_columns, column_problem, read_footer
from batchinfer.source.for_polars import type_for_polars
from batchinfer.source.left_out import in_print
from batchinfer.source.parquet import Block, ShardReader
from batchinfer.source.patterns import matches
from batchinfer.source.plain import has_uuids, plain_column, plain_type
from batchinfer.source.shards import Shard, list_shards
from batchinfer.source.text import with_valid_text
from batchinfer.source.types import common_field, is_finer, output_field, takes

__all__ = [
    "Block",
    "Fingerprint",
    "Footer",
    "RowFilter",
    "RowGroup",
    "Shard",
    "ShardReader",
    "cast_column",
    "cast_table",
    "check_columns",
    "column_problem",
    "common_field",
    "has_uuids",
    "in_print",
    "is_finer",
    "list_shards",
    "matches",
    "output_field",
    "plain_column",
    "plain_type",
    "read_footer",
    "same_content",
    "takes",
    "type_for_polars",
    "with_valid_text",
]
