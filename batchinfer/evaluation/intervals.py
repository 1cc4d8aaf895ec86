"""How far a mean over windows or rows could be from what more of them would give.

By the bootstrap (Efron 1979): windows are drawn with replacement, as many as there are, and the
figure is computed of each draw; the interval is between its 2.5 and 97.5 percentiles. The draws
are the same in every call. Neighbouring windows are of one text and not independent, so the true
interval is rather wider. Shares of rows have Wilson's interval. Must not know: what the numbers
are.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

NUM_DRAWS = 10_000
PERCENTILES = (2.5, 97.5)
_SEED = 1979
_Z_95 = 1.959964  # standard deviations of a Gaussian's 97.5 percentile
_MAX_NUMBERS = 1 << 22  # in memory at a time


def ratio_interval(numerators: Float64Array, weights: Float64Array) -> tuple[float, float] | None:
    """95 % interval of sum(numerators) / sum(weights), drawn by entry. None for a single entry.

    `numerators`, `weights`: [n], such as the NLL of each window and its tokens. An entry without
    weight, such as a row of one token, says nothing of the ratio: draws are of the others.
    """
    has_weight = weights > 0
    numerators, weights = numerators[has_weight], weights[has_weight]
    num_entries = len(numerators)
    if num_entries < 2:
        return None
    rng = np.random.default_rng(_SEED)
    per_round = max(1, _MAX_NUMBERS // num_entries)
    ratios: list[Float64Array] = []
    left = NUM_DRAWS
    while left:
        num = min(left, per_round)
        drawn = rng.integers(0, num_entries, size=(num, num_entries))
        ratios.append(numerators[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
        left -= num
    low, high = np.percentile(np.concatenate(ratios), PERCENTILES)
    return float(low), float(high)


def share_interval(num_hits: int, num_rows: int) -> tuple[float, float]:
    """95 % interval of a share of rows (Wilson 1927), num_rows at least 1.

    Of no hit, or of nothing but hits, every draw of the bootstrap is the same: it would be certain.
    """
    share, z2 = num_hits / num_rows, _Z_95**2
    middle = share + z2 / (2 * num_rows)
    spread = _Z_95 * math.sqrt(share * (1 - share) / num_rows + z2 / (4 * num_rows**2))
    scale = 1 + z2 / num_rows
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
