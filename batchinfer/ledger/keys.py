"""Which (row, sample) a file of results has, read from its key columns alone.

Must not know: stores, names of files, what a part is. Memory: 13 bytes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_KEY_COLUMNS = ["row", "sample", "error_type"]
_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of results. [n] each"""

    row: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int32]
    is_error: npt.NDArray[np.bool_]

    def slice(self, low: int, high: int) -> Keys:
        return Keys(self.row[low:high], self.sample[low:high], self.is_error[low:high])

    def codes(self, mask: npt.NDArray[np.bool_], num_samples: int) -> npt.NDArray[np.int64]:
        """One number for each (row, sample) that `mask` selects. [n] -> [sum of mask]"""
        return self.row[mask] * num_samples + self.sample[mask]


def read_keys(file: pq.ParquetFile) -> Keys:
    """Keys of an open file of results, which was opened with `pre_buffer=False`.

    Without pyarrow's threads: for a part of 250 rows they take 1.4 ms, the reading 0.1 ms.
    """
    batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=_KEY_COLUMNS, use_threads=False)
    return concat_keys([_keys_of(batch) for batch in batches])


def concat_keys(pieces: Sequence[Keys]) -> Keys:
    return Keys(
        np.concatenate([np.empty(0, np.int64), *(keys.row for keys in pieces)]),
        np.concatenate([np.empty(0, np.int32), *(keys.sample for keys in pieces)]),
        np.concatenate([np.empty(0, np.bool_), *(keys.is_error for keys in pieces)]),
    )


def _keys_of(batch: pa.RecordBatch) -> Keys:
    return Keys(
        batch.column("row").to_numpy(),
        batch.column("sample").to_numpy(),
        pc.is_valid(batch.column("error_type")).to_numpy(zero_copy_only=False),
    )
