"""numpy to Arrow by concatenation: no Python object for a token.

Must not know: what the values mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def lists(values: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
    """One list a row by concatenation; None is a null list."""
    is_null = pa.array([v is None for v in values], pa.bool_())
    offsets = list_offsets([0 if v is None else len(v) for v in values])
    return pa.ListArray.from_arrays(offsets, flat_values(values, dtype), mask=is_null)


def list_sums(lists: pa.ListArray) -> pa.Array:
    """The sum of each list in double precision; null for a null list. [n]"""
    flat = lists.values.to_numpy().astype(np.float64)
    offsets = lists.offsets.to_numpy()
    sums = np.zeros(len(lists), np.float64)
    is_filled = offsets[1:] > offsets[:-1]  # reduceat takes no empty ranges
    if is_filled.any():
        sums[is_filled] = np.add.reduceat(flat, offsets[:-1][is_filled])
    return pa.array(sums, mask=lists.is_null().to_numpy(zero_copy_only=False))


def ints(values: list[int], is_null: npt.NDArray[np.bool_]) -> pa.Array:
    """int32, null where `is_null`. [n]"""
    return pa.array(np.array(values, dtype=np.int32), mask=is_null)


def list_offsets(lengths: Sequence[int] | npt.NDArray[np.integer[Any]]) -> pa.Array:
    """Arrow's offsets of lists of these lengths. [n + 1] int32"""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def flat_values(arrays: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.Array:
    """All arrays one behind the other; None has no values."""
    present = [array for array in arrays if array is not None]
    flat = np.concatenate(present) if present else np.empty(0)
    return pa.array(flat.astype(dtype, copy=False))
