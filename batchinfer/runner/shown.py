"""For --debug: the first prompts of a run as they are sent.

Must not know: engines, who reads the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from batchinfer.prompt import Prepared, RowPrompter

logger = logging.getLogger("batchinfer.runner")

_NUM_SHOWN = 3


class ShownPrompts:
    """Logs the first prompts at the level DEBUG. Costs nothing where that is off."""

    def __init__(self, prompter: RowPrompter) -> None:
        self._encoder = prompter.encoder
        self._num_left = _NUM_SHOWN if logger.isEnabledFor(logging.DEBUG) else 0

    def show(
        self, shard: str, rows: Sequence[int] | npt.NDArray[np.int64], prepared: Prepared
    ) -> None:
        """`rows`: the numbers in the shard of what was prepared."""
        for index in range(min(self._num_left, len(rows))):
            start, stop = prepared.offsets[index : index + 2]
            place = f"{shard}:{int(rows[index])}"
            self._num_left -= 1
            if (error := prepared.errors.get(index)) is not None:
                logger.debug("prompt of %s: %s: %s", place, error.kind, error.message)
                continue
            token_ids = prepared.token_ids[start:stop]
            text = "".join(text for text, _ in self._encoder.pieces(token_ids))
            logger.debug("prompt of %s, %d tokens: %r", place, len(token_ids), text)
            logger.debug("token ids of %s: %s", place, token_ids.tolist())
