"""The order of admission inside a chunk, and which of its prompts are the same.

Must not know: what a token means, how rows are read or run. Invariant: an order is a permutation of
the rows it was given, so every row is admitted exactly once whatever the sizes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


def order_rows(num_prompt_tokens: Int64Array, order: str) -> Int64Array:
    """Row indices in order of admission. [n] -> [n]

    "length": longest expected work first. Every row may decode `max_tokens`, so the expected work
    differs by the prompt alone. Longest first, because the longest rows admitted last would run on
    alone at the end, an out-of-memory shows at once, and an ETA errs to the high side.
    "input": as they stand in the file. Ties keep the order of the file.
    """
    if order == "input":
        return np.arange(len(num_prompt_tokens), dtype=np.int64)
    assert order == "length", order
    return np.argsort(-num_prompt_tokens, kind="stable").astype(np.int64)


def find_duplicates(token_ids: Int32Array, offsets: Int64Array) -> Int64Array:
    """For each row the index of the first row with the same prompt, -1 where it is itself the
    first.

    Empty rows (errors) are nobody's duplicate. token_ids [offsets[-1]], offsets [n + 1] -> [n]
    """
    num_rows = len(offsets) - 1
    leader = np.full(num_rows, -1, dtype=np.int64)
    first_by_prompt: dict[bytes, int] = {}
    flat = token_ids.tobytes()
    starts = (offsets * token_ids.itemsize).tolist()
    for row in range(num_rows):
        if starts[row] == starts[row + 1]:
            continue
        first = first_by_prompt.setdefault(flat[starts[row] : starts[row + 1]], row)
        if first != row:
            leader[row] = first
    return leader
