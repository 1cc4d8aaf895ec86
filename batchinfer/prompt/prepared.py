"""Rows that became token ids, or errors: what the prompt room hands on.

Must not know: how they became so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchinfer.errors import RowError
from batchinfer.prompt.encode import Int32Array, Int64Array
from batchinfer.prompt.remarks import Remark

ObjectArray = npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Row i's prompt is token_ids[offsets[i]:offsets[i + 1]], empty if `errors` has i."""

    token_ids: Int32Array  # [offsets[-1]]
    offsets: Int64Array  # [num_rows + 1]
    errors: dict[int, RowError] = field(default_factory=dict)
    remarks: dict[Remark, list[int]] = field(default_factory=dict)  # -> rows
    num_cut: int = 0  # prompts that were shortened to fit
    counts: Mapping[str, Int64Array] = field(default_factory=dict)  # [num_rows], for the task
    # Where rows have settings of their own, else None: an `OwnSampling`, None with an error.
    own: ObjectArray | None = None  # [num_rows]


def joined_counts(parts: Sequence[Prepared]) -> dict[str, Int64Array]:
    """`counts` of all rows of `parts`, which one prompter made."""
    return {name: np.concatenate([part.counts[name] for part in parts]) for name in parts[0].counts}


def joined_own(parts: Sequence[Prepared]) -> ObjectArray | None:
    """`own` of all rows of `parts`, which one prompter made."""
    present = [part.own for part in parts if part.own is not None]
    return np.concatenate(present) if present else None


def joined(parts: Sequence[Prepared], num_rows: int) -> Prepared:
    """What was prepared of a table `num_rows` rows at a time."""
    ends = np.cumsum([len(part.token_ids) for part in parts])
    starts = [0, *ends[:-1].tolist()]
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
    joined = Prepared(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        num_cut=sum(part.num_cut for part in parts),
        counts=joined_counts(parts),
    )
    for number, part in enumerate(parts):
        first = number * num_rows
        joined.errors.update({first + i: error for i, error in part.errors.items()})
        for remark, rows in part.remarks.items():
            joined.remarks.setdefault(remark, []).extend(first + i for i in rows)
    return joined
