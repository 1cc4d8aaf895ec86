"""Warns of ids that name no row, or more than one: once for nulls and once for duplicates in a run.

Must not know: where rows come from. Only a warning: results are identified by (shard, row).
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

logger = logging.getLogger("batchinfer.runner")

_MEANING = (
    "Results stay unambiguous by (shard, row); the id alone does not name a row. "
    "`batchinfer validate --ids` counts them all"
)


class IdWarnings:
    """Looks at the ids of a chunk at a time; may be called from several threads."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._lock = threading.Lock()
        self._is_null_told = False
        self._is_duplicate_told = False

    def check(self, shard: str, rows: npt.NDArray[np.int64], ids: pa.ChunkedArray) -> None:
        """`rows`: the row number of each id, for the message. [n]"""
        with self._lock:
            if not self._is_null_told and ids.null_count:
                self._is_null_told = True
                first = int(rows[pc.index(ids.is_null(), True).as_py()])
                logger.warning(
                    "input.id_column %r is null in %d of %d rows read together, first %s:%d. %s",
                    self._column,
                    ids.null_count,
                    len(ids),
                    shard,
                    first,
                    _MEANING,
                )
            if not self._is_duplicate_told and (repeated := _first_repeated(ids)) is not None:
                self._is_duplicate_told = True
                logger.warning(
                    "input.id_column %r has the value %r in several rows, such as %s:%s. %s",
                    self._column,
                    _shown(ids[repeated[0]]),
                    shard,
                    " and ".join(str(int(rows[index])) for index in repeated),
                    _MEANING,
                )


def _shown(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):  # a time that Python has none for, or no UTF-8
        return str(value.type)


def _first_repeated(ids: pa.ChunkedArray) -> tuple[int, int] | None:
    """Indices of the first two rows that share an id, None without any (or for nested types)."""
    if pa.types.is_nested(ids.type):
        return None
    try:
        codes = ids.combine_chunks().dictionary_encode().indices
    except pa.ArrowNotImplementedError:  # of a type that ids seldom have
        return None
    codes = codes.fill_null(-1).to_numpy(zero_copy_only=False)
    num_values = int(codes.max(initial=-1)) + 1
    if num_values == np.count_nonzero(codes >= 0):
        return None
    repeated = np.bincount(codes[codes >= 0])[codes] > 1
    first = int(np.flatnonzero(repeated & (codes >= 0))[0])
    return first, int(np.flatnonzero(codes == codes[first])[1])
