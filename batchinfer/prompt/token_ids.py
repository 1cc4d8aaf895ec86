"""A column of token id lists as flat arrays, without a Python object for a token or a row.

Must not know: limits of length. Invariant: ids in a row without an error are in [0, vocab_size).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import RowError
from batchinfer.prompt.encode import Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Row i's ids are values[starts[i]:stops[i]]."""

    values: Int64Array
    starts: Int64Array
    stops: Int64Array
    errors: dict[int, RowError]

    def gather(self) -> tuple[Int32Array, Int64Array]:
        """(token ids, offsets) of the rows one behind the other."""
        lengths = self.stops - self.starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = np.arange(offsets[-1]) + np.repeat(self.starts - offsets[:-1], lengths)
        return self.values[positions].astype(np.int32), offsets


def read_token_ids(column: pa.ChunkedArray, vocab_size: int) -> TokenIds:
    """`column`: lists of any integer type, or all null."""
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.int64()))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    flat = pc.list_flatten(column)
    # Of unsigned ids past 2 ** 63 - 1 negative ones are made: outside of any vocabulary, too.
    values = pc.fill_null(flat.cast(pa.int64(), safe=False), -1).to_numpy()
    stops = np.cumsum(lengths)
    errors = {
        index: RowError("missing_value", "the token ids are null")
        for index in np.flatnonzero(pc.is_null(column).to_numpy()).tolist()
    }
    bad = np.flatnonzero((values < 0) | (values >= vocab_size))
    rows, first = np.unique(np.searchsorted(stops, bad, side="right"), return_index=True)
    for row, position in zip(rows.tolist(), bad[first].tolist(), strict=True):
        found = flat[position].as_py()
        errors[row] = RowError(
            "invalid_prompt",
            f"token id {'null' if found is None else found} at position "
            f"{position - int(stops[row] - lengths[row])} is outside the vocabulary "
            f"(0 to {vocab_size - 1})",
        )
    return TokenIds(values, stops - lengths, stops, errors)
