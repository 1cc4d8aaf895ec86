"""How our Parquet files are written and what their footer says.

Must not know: names of files, when they are published. Parts and finished files are written alike,
so a reader of one can read the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.sink.schema import repeating_columns

#: Key of our JSON in the footer's key-value metadata; a file without it is not ours.
FACTS_KEY = b"batchinfer"

# Dictionary encoding pays for columns of few values; on token ids and logprobs it only costs time.
_DICTIONARY_COLUMNS = frozenset(repeating_columns())

_PAGE_BYTES = 1 << 20
#: A page ends at the first multiple of this number of rows that exceeds its size; Arrow's 1,024
#: would make pages of 20 MB of rows of 20 kB.
_PAGE_STEP_ROWS = 256
#: A fold holds a page of each column of each part of a window, and there can be hundreds of parts.
_PART_PAGE_BYTES = 64 << 10


def part_writer(
    sink: BinaryIO,
    schema: pa.Schema,
    *,
    page_bytes: int = _PAGE_BYTES,
    page_step_rows: int = _PAGE_STEP_ROWS,
) -> pq.ParquetWriter:
    """A writer with our settings. The caller writes row groups and closes it."""
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[n for n in schema.names if n in _DICTIONARY_COLUMNS],
        data_page_size=page_bytes,
        write_batch_size=page_step_rows,
        write_page_index=True,
    )


def write_table(sink: BinaryIO, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """A whole part: one row group (none if the table is empty), with `facts` in the footer."""
    rows_per_page = _PART_PAGE_BYTES * table.num_rows // max(1, table.nbytes)
    page_step_rows = max(1, min(_PAGE_STEP_ROWS, rows_per_page))
    with part_writer(
        sink, table.schema, page_bytes=_PART_PAGE_BYTES, page_step_rows=page_step_rows
    ) as writer:
        if table.num_rows:
            writer.write_table(table, row_group_size=table.num_rows)
        writer.add_key_value_metadata({FACTS_KEY: json.dumps(facts)})


def file_facts(metadata: pq.FileMetaData) -> dict[str, Any] | None:
    """Our facts in a file's footer, None if the file is not ours."""
    raw = (metadata.metadata or {}).get(FACTS_KEY)
    if raw is None:
        return None
    try:
        facts = json.loads(raw)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None
