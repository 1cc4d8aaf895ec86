"""The input: which shards there are, what is in them, and their rows as Arrow blocks."""

from batchinfer.source.filters import RowFilter
from batchinfer.source.fingerprints import Fingerprint, same_content
from batchinfer.source.footer import Footer, RowGroup, check_columns, read_footer
from batchinfer.source.left_out import in_print
from batchinfer.source.parquet import Block, ShardReader
from batchinfer.source.patterns import matches
from batchinfer.source.shards import Shard, list_shards

__all__ = [
    "Block",
    "Fingerprint",
    "Footer",
    "RowFilter",
    "RowGroup",
    "Shard",
    "ShardReader",
    "check_columns",
    "in_print",
    "list_shards",
    "matches",
    "read_footer",
    "same_content",
]
