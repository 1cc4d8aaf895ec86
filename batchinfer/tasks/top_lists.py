"""The likeliest tokens of completions as two columns of lists of lists.

Must not know: tasks, engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.engine.demands.completion import Completion
from batchinfer.tasks.arrays import flat_values, list_offsets


def top_lists(done: Sequence[Completion]) -> tuple[pa.ListArray, pa.ListArray]:
    """list<list> of token ids and of logprobs: for each row, for each token, the k entries that
    `top_offsets` delimits.
    """
    is_null = pa.array([c.top_offsets is None for c in done], pa.bool_())
    present = [c.top_offsets for c in done if c.top_offsets is not None]
    num_bounds = np.array([len(offsets) for offsets in present], np.int64)
    bounds = np.concatenate([np.empty(0, np.int32), *present])
    is_token = np.ones(len(bounds), np.bool_)
    is_token[np.cumsum(num_bounds) - 1] = False  # the last bound of a row begins no token
    inner_offsets = list_offsets(np.diff(bounds, append=0)[is_token])
    outer_offsets = list_offsets(
        [0 if c.top_offsets is None else len(c.top_offsets) - 1 for c in done]
    )

    def nested(values: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
        inner = pa.ListArray.from_arrays(inner_offsets, flat_values(values, dtype))
        return pa.ListArray.from_arrays(outer_offsets, inner, mask=is_null)

    return (
        nested([c.top_token_ids for c in done], np.int32),
        nested([c.top_logprobs for c in done], np.float32),
    )
