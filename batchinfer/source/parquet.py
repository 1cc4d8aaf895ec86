"""Rows of one shard as Arrow blocks of bounded size, in row order.

Must not know: prompts, what is done. A row group of any size is read in bounded memory: no
pre-buffering, a small read buffer, few rows at a time (one 386 MB row group took +469 MB with
pyarrow's defaults). Invariant: every row of [start, stop) that passes the filter is in exactly one
block, under its number in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import InputError
from batchinfer.source.filters import RowFilter
from batchinfer.source.footer import (
    INT96_UNIT,
    check_columns,
    check_partition,
    open_shard,
    parse_footer,
)
from batchinfer.source.partitions import partition_value
from batchinfer.source.plain import plain_column
from batchinfer.source.shards import Shard

_BUFFER_BYTES = 1024 * 1024
# The footer has encoded sizes. A text that repeats is stored once, so its rows can be far larger
# than they look; few rows at a time keep that bounded.
_MAX_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a shard: `table` has exactly the reader's columns, in plain types."""

    rows: npt.NDArray[np.int64]  # row numbers in the shard, ascending
    table: pa.Table

    def take(self, indices: npt.NDArray[np.int64]) -> Block:
        """Some of the rows. Of a table without columns pyarrow would take none."""
        if self.table.num_columns:
            return Block(self.rows[indices], self.table.take(pa.array(indices)))
        without_columns = pa.table({"row": self.rows[indices]}).select([])
        return Block(self.rows[indices], without_columns)


class ShardReader:
    """An open shard, used by one thread. Ranges that follow each other are read in one go."""

    def __init__(
        self,
        shard: Shard,
        columns: Sequence[str],
        row_filter: RowFilter | None = None,
        *,
        max_block_bytes: int = 8 * 1024 * 1024,
    ) -> None:
        """Raises InputError if the shard cannot be read or lacks a column."""
        self._shard = shard
        self._columns = list(dict.fromkeys(columns))
        self._filter = row_filter
        self._max_block_bytes = max_block_bytes
        of_filter = row_filter.columns if row_filter else ()
        self._needed = list(dict.fromkeys([*self._columns, *of_filter]))
        self._file = open_shard(shard)
        try:
            self._footer = parse_footer(self._file, shard)
            self._partitions = self._footer.partitions
            check_columns(self._footer, self._needed, shard)
            self._stored = [name for name in self._needed if name in self._footer.num_named]
            self._parquet = pq.ParquetFile(
                self._file,
                metadata=self._footer.metadata,
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                coerce_int96_timestamp_unit=INT96_UNIT,
                page_checksum_verification=True,  # of pages that have one
            )
        except BaseException:
            self._file.close()
            raise
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group = -1  # the row group that `_batches` reads
        self._rest: pa.RecordBatch | None = None  # read, and not handed out yet
        self._position = 0  # number of the next row of `_rest` and `_batches`

    @property
    def num_rows(self) -> int:
        return self._footer.num_rows

    @property
    def footer_sha256(self) -> str:
        return self._footer.sha256

    @property
    def schema(self) -> pa.Schema:
        """Plain types of the columns, partition columns as string."""
        stored = self._footer.schema
        return pa.schema(
            [
                pa.field(name, pa.string())
                if name in self._partitions
                else pa.field(name, stored.field(name).type)
                for name in self._columns
            ]
        )

    def blocks(self, start_row: int, stop_row: int) -> Iterator[Block]:
        """Rows of [start_row, stop_row) that pass the filter. Only their row groups are touched.

        Raises InputError if the shard vanished, shrank or is damaged.
        """
        assert 0 <= start_row <= stop_row <= self.num_rows
        with self._reading():
            self._seek(start_row)
        pending: list[pa.RecordBatch] = []
        num_bytes = 0
        first_row = start_row
        while self._position < stop_row:
            with self._reading():
                batch = self._next_batch(stop_row - self._position)
            pending.append(batch)
            num_bytes += batch.nbytes
            if num_bytes >= self._max_block_bytes or self._position == stop_row:
                yield self._block(first_row, pa.Table.from_batches(pending))
                pending, num_bytes, first_row = [], 0, self._position

    def close(self) -> None:
        """Idempotent."""
        self._batches = iter(())
        self._rest = None
        self._parquet.close()
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _seek(self, row: int) -> None:
        group = next(
            (i for i, g in enumerate(self._footer.row_groups) if row < g.first_row + g.num_rows),
            len(self._footer.row_groups),
        )
        if row < self._position or group > self._group:
            self._open_group(group)
        while self._position < row:
            self._next_batch(row - self._position)

    def _open_group(self, index: int) -> None:
        self._rest = None
        self._group = index
        self._batches = iter(())
        if index >= len(self._footer.row_groups):
            self._position = self._footer.num_rows
            return
        group = self._footer.row_groups[index]
        self._position = group.first_row
        self._batches = self._parquet.iter_batches(
            batch_size=self._batch_rows(index),
            row_groups=[index],
            columns=self._stored,
            use_threads=False,
        )

    def _batch_rows(self, index: int) -> int:
        group = self._footer.row_groups[index]
        rows = self._max_block_bytes * group.num_rows // max(1, group.size_bytes)
        return max(1, min(rows, _MAX_BATCH_ROWS))

    def _next_batch(self, max_rows: int) -> pa.RecordBatch:
        """At most `max_rows` rows from the position on, which moves behind them."""
        while self._rest is None or self._rest.num_rows == 0:
            group = self._footer.row_groups[self._group]
            stop_row = group.first_row + group.num_rows
            if self._position == stop_row:
                # Never asked for a batch behind the last: Arrow aborts the process for some types.
                self._open_group(self._group + 1)
                continue
            self._rest = next(self._batches, None)
            if self._rest is None:
                raise InputError(
                    f"{self._shard.url} is damaged: row group {self._group} ends at row "
                    f"{self._position}, its footer says {stop_row}"
                )
        batch = self._rest.slice(0, max_rows)
        self._rest = self._rest.slice(batch.num_rows)
        self._position += batch.num_rows
        return batch

    def _block(self, first_row: int, stored: pa.Table) -> Block:
        rows = np.arange(first_row, first_row + stored.num_rows, dtype=np.int64)
        fields, columns = [], []
        for name in self._needed:
            column = self._column(name, stored)
            is_stored = name in self._footer.num_named and name not in self._partitions
            metadata = self._footer.schema.field(name).metadata if is_stored else None
            fields.append(pa.field(name, column.type, metadata=metadata))
            columns.append(column)
        table = pa.table(columns, pa.schema(fields)) if columns else stored.select([])
        if self._filter is not None:
            try:
                mask = self._filter.mask(table)
            except InputError as error:
                where = f"{self._shard.url}, rows {first_row} to {first_row + len(rows) - 1}"
                raise InputError(f"{where}: {error}") from error
            if not mask.all():
                return Block(rows, table.select(self._columns)).take(np.flatnonzero(mask))
        return Block(rows, table.select(self._columns))

    def _column(self, name: str, stored: pa.Table) -> pa.ChunkedArray:
        if name not in self._partitions:
            return plain_column(stored.column(name))
        value = self._partitions[name]
        if name in self._stored:
            check_partition(name, value, plain_column(stored.column(name)), self._shard)
        return pa.chunked_array([pa.repeat(partition_value(value), stored.num_rows)])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Names the shard in whatever pyarrow or the file says; the Store's own errors pass."""
        try:
            yield
        except FileNotFoundError:
            raise InputError(f"{self._shard.url} vanished while it was read") from None
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self._shard.url} cannot be read past row {self._position}: {error}. "
                "It was changed while it was read, or is damaged"
            ) from error
