"""Says what is odd about prompts once in a run: what, in how many rows read together, and where.

Must not know: what remarks mean.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from batchinfer.prompt import Remark, sentence

logger = logging.getLogger("batchinfer.runner")


class RemarkWarnings:
    """Looks at the remarks on a block of rows; may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def check(
        self, shard: str, rows: npt.NDArray[np.int64], remarks: Mapping[Remark, Sequence[int]]
    ) -> None:
        """`rows`: numbers of the rows in the shard. `remarks`: remark -> indices of rows."""
        if not remarks:
            return
        with self._lock:
            for kind in dict.fromkeys(kind for kind, _ in remarks if kind not in self._told):
                self._told.add(kind)
                names = [about for of_kind, about in remarks if of_kind == kind]
                indices = {
                    i for remark, found in remarks.items() if remark[0] == kind for i in found
                }
                logger.warning(
                    "%s (in %d of %d rows read together, first %s:%d)",
                    sentence(kind, names),
                    len(indices),
                    len(rows),
                    shard,
                    int(rows[min(indices)]),
                )
