"""The tokens of a step as llama.cpp's C structure, in arrays that are filled anew each time.

Must not know: requests, sampling.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.errors import EngineDied
from batchinfer.llama_cpp.library import Batch


class StepBatch:
    """Room for `max_tokens`. Row i of the logits is that of the i-th position that wants them."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._num_sequences = np.ones(max_tokens, np.int32)
        self._sequences = np.zeros(max_tokens, np.int32)
        address = self._sequences.ctypes.data
        self._places = np.arange(max_tokens, dtype=np.uint64) * 4 + np.uint64(address)
        self._has_logits = np.zeros(max_tokens, np.int8)
        self._last_index: dict[int, int] = {}
        self._num_tokens = self._num_outputs = 0

    @property
    def room(self) -> int:
        return self._max_tokens - self._num_tokens

    def clear(self) -> None:
        self._num_tokens = self._num_outputs = 0
        self._last_index.clear()

    def add(
        self,
        tokens: Sequence[int] | npt.NDArray[np.int32],
        position: int,
        slot: int,
        *,
        num_outputs: int,
    ) -> int:
        """Consecutive tokens of a sequence, of which the last `num_outputs` want logits.

        Returns the first of their rows.
        """
        start, num = self._num_tokens, len(tokens)
        stop = start + num
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = np.arange(position, position + num)
        self._sequences[start:stop] = slot
        self._has_logits[start:stop] = 0
        self._has_logits[stop - num_outputs : stop] = num_outputs > 0
        self._last_index[slot] = stop - 1
        first = self._num_outputs
        self._num_tokens, self._num_outputs = stop, first + num_outputs
        return first

    def last_index_of(self, slot: int) -> int:
        """Where in the batch a sequence's last token is."""
        return self._last_index[slot]

    def as_argument(self) -> Batch:
        """Valid until the arrays are filled again."""
        return Batch(
            n_tokens=self._num_tokens,
            token=self._tokens.ctypes.data,
            embd=None,
            pos=self._positions.ctypes.data,
            n_seq_id=self._num_sequences.ctypes.data,
            seq_id=self._places.ctypes.data,
            logits=self._has_logits.ctypes.data,
        )

    def logits_of(self, lib: Any, context: Any, vocab_size: int) -> npt.NDArray[np.float32]:
        """[rows, vocabulary], a view of llama.cpp's memory until the next step."""
        if not self._num_outputs:
            return np.empty((0, vocab_size), np.float32)
        first = lib.llama_get_logits(context)
        if not first:
            raise EngineDied("llama.cpp gave no logits of a step")
        kind = ctypes.POINTER(ctypes.c_float * (self._num_outputs * vocab_size))
        whole = np.ctypeslib.as_array(ctypes.cast(first, kind).contents)
        return whole.reshape(self._num_outputs, vocab_size)
