"""Logprobs of tokens, and the likeliest ones beside them, from logits.

Must not know: requests, what tokens mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

_ROWS = 64  # looked through together: the exponentials are a copy of so many rows


class Positions:
    """Of consecutive positions: each one's token's logprob, and its top list."""

    def __init__(self) -> None:
        self._logprobs: list[Float32Array] = []
        self._top_ids: list[Int32Array] = []
        self._top_logprobs: list[Float32Array] = []

    def __bool__(self) -> bool:
        return bool(self._logprobs)

    def add(self, logits: Float32Array, tokens: npt.NDArray[np.integer], num_top: int) -> None:
        """`logits` [rows, vocabulary], `tokens` [rows]."""
        for start in range(0, len(tokens), _ROWS):
            part = slice(start, start + _ROWS)
            self._add(logits[part], tokens[part], num_top)

    def _add(self, logits: Float32Array, tokens: npt.NDArray[np.integer], num_top: int) -> None:
        most = logits.max(axis=1)
        sums = np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64)
        shift = most + np.log(sums)  # float64 [rows]
        rows = np.arange(len(tokens))
        self._logprobs.append((logits[rows, tokens] - shift).astype(np.float32))
        if not num_top:
            return
        num_top = min(num_top, logits.shape[1])
        found = np.argpartition(-logits, num_top - 1, axis=1)[:, :num_top]
        values = np.take_along_axis(logits, found, axis=1)
        order = np.lexsort((found, -values), axis=1)
        ids = np.take_along_axis(found, order, axis=1)
        self._top_ids.append(ids.astype(np.int32))
        of_top = np.take_along_axis(values, order, axis=1) - shift[:, None]
        self._top_logprobs.append(of_top.astype(np.float32))

    def logprobs(self, *, has_first: bool = True) -> Float32Array:
        """[positions]; `has_first` False: before them one that has none, NaN."""
        first = [] if has_first else [np.full(1, np.nan, np.float32)]
        return np.concatenate([*first, *self._logprobs, np.empty(0, np.float32)])

    def flat_tops(self) -> tuple[Int32Array, Int32Array, Float32Array]:
        """(offsets [positions + 1], token ids, logprobs)"""
        ids, logprobs = np.concatenate(self._top_ids), np.concatenate(self._top_logprobs)
        offsets = np.arange(len(ids) + 1, dtype=np.int32) * ids.shape[1]
        return offsets, ids.ravel(), logprobs.ravel()

    def tops(self, num_top: int) -> tuple[Int32Array, Float32Array]:
        """[positions + 1, num_top] each; of the first position, and past the vocabulary, none."""
        count = 1 + sum(map(len, self._top_ids))
        ids = np.full((count, num_top), -1, np.int32)
        logprobs = np.full((count, num_top), np.nan, np.float32)
        if self._top_ids:
            found = np.concatenate(self._top_ids)
            ids[1:, : found.shape[1]] = found
            logprobs[1:, : found.shape[1]] = np.concatenate(self._top_logprobs)
        return ids, logprobs
