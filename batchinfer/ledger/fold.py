"""The fold: (finished file, parts) -> finished file, streaming in row order, in bounded memory.

For each (row, sample): success beats error, then what the finished file has, then the earliest part
by (run, sequence). Pure: it reads its sources and hands out tables; publishing and deleting are the
caller's. Must not know: stores, leases, where the sources came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.sink import file_facts

#: Uncompressed bytes of a row group of a finished file. A fold holds about three times as much: the
#: rows read, the winners taken from them, and their encoded pages.
MAX_ROW_GROUP_BYTES = 8 << 20
MAX_ROW_GROUP_ROWS = 8192
_CURSORS_BYTES = 8 << 20
_MIN_BATCH_BYTES = 16 << 10
_READ_BUFFER_BYTES = 64 << 10


class UnreadableSource(Exception):
    """A source is no Parquet file, or breaks off; `rank` says which."""

    def __init__(self, rank: int, problem: str) -> None:
        super().__init__(problem)
        self.rank = rank


def batch_bytes_of(num_cursors: int) -> int:
    """How much each of `num_cursors` may hold: parts lie side by side in a window."""
    return max(_MIN_BATCH_BYTES, _CURSORS_BYTES // max(1, num_cursors))


class Cursor:
    """Reads one file, sorted by (row, sample), in row order; holds about `batch_bytes` of it."""

    def __init__(self, source: BinaryIO, *, rank: int, batch_bytes: int) -> None:
        self.rank = rank
        self._source = source
        with self._reading():
            self._file = pq.ParquetFile(source, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
        metadata = self._file.metadata
        self.num_rows = metadata.num_rows
        self.facts = file_facts(metadata)
        self.size_bytes = sum(
            metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
        )
        batch_rows = max(1, batch_bytes * self.num_rows // max(1, self.size_bytes))
        self._batches = self._file.iter_batches(batch_size=min(batch_rows, 4096), use_threads=False)
        self._rest: pa.Table | None = None

    def take_below(self, row_bound: int) -> pa.Table | None:
        """The next rows with row < row_bound, None if there are none."""
        taken = []
        while True:
            if self._rest is None:
                with self._reading():
                    batch = next(self._batches, None)
                if batch is None:
                    break
                self._rest = pa.Table.from_batches([batch]).replace_schema_metadata(None)
            rows = self._rest.column("row").to_numpy()
            cut = int(np.searchsorted(rows, row_bound, side="left"))
            if cut:
                taken.append(self._rest.slice(0, cut))
            if cut < len(rows):
                self._rest = self._rest.slice(cut)
                break
            self._rest = None
        return pa.concat_tables(taken) if taken else None

    def close(self) -> None:
        self._source.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise  # it vanished: the caller looks again
        except (pa.ArrowInvalid, OSError) as error:
            raise UnreadableSource(self.rank, str(error).splitlines()[0]) from error


def fold_window(
    cursors: Sequence[Cursor], start_row: int, stop_row: int, *, num_samples: int = 1
) -> Iterator[pa.Table]:
    """Winners among the cursors' rows in [start_row, stop_row), as tables of bounded size, in row
    order.

    Every cursor must stand at or before start_row and is left at stop_row.
    """
    num_rows = sum(c.num_rows for c in cursors)
    size_bytes = sum(c.size_bytes for c in cursors)
    results = min(MAX_ROW_GROUP_ROWS, MAX_ROW_GROUP_BYTES * num_rows // max(1, size_bytes))
    step = max(1, results // num_samples)  # in rows
    for low in range(start_row, stop_row, step):
        tables, ranks = [], []
        for cursor in cursors:
            table = cursor.take_below(min(low + step, stop_row))
            if table is not None:
                tables.append(table)
                ranks.append(np.full(table.num_rows, cursor.rank, dtype=np.int64))
        if tables:
            try:
                table = pa.concat_tables(tables)
            except pa.ArrowInvalid:
                odd = next(i for i, other in enumerate(tables) if other.schema != tables[0].schema)
                problem = "its columns are not those of the output's other files"
                raise UnreadableSource(int(ranks[odd][0]), problem) from None
            yield table.take(pa.array(winners(table, np.concatenate(ranks))))


def winners(table: pa.Table, rank: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices of the winning rows of `table`, in (row, sample) order.

    `rank`: lower is preferred. [n]
    """
    row = table.column("row").to_numpy()
    sample = table.column("sample").to_numpy()
    is_error = pc.is_valid(table.column("error_type")).to_numpy()
    order = np.lexsort((rank, is_error, sample, row))
    row, sample = row[order], sample[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (row[1:] != row[:-1]) | (sample[1:] != sample[:-1])
    winning: npt.NDArray[np.int64] = order[is_first]
    return winning
