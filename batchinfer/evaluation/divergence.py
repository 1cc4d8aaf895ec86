"""How far one model's next-token distributions are from another's, from their likeliest tokens.

Of each position both outputs hold the k likeliest tokens and the token that was scored. The tokens
that both of them name, and the scored one, are compared one by one, and all that remains is lumped
into one event. So what is given is

    KL = sum over events e of p(e) * (log p(e) - log q(e)),   p the reference, q the candidate

of two coarser distributions, which is never more than that of the full ones (data processing
inequality, Cover and Thomas, theorem 2.8.1) and grows towards it with k. A token that one of them
rules out (-inf) is in the rest too, so that the figure is finite. Must not know: files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.evaluation.intervals import Float64Array

#: Logprobs are float32: less remaining mass than this is rounding.
_MIN_MASS = 1e-6
_MAX_PAIRS = 1 << 22  # compared at a time


@dataclass(frozen=True, slots=True)
class Tops:
    """Likeliest tokens at n positions, best first; `token_logprobs` are the scored tokens'."""

    token_ids: npt.NDArray[np.int32]  # [n, k]
    logprobs: npt.NDArray[np.float32]  # [n, k]
    token_logprobs: npt.NDArray[np.float32]  # [n]

    def rows(self, part: slice) -> Tops:
        return Tops(self.token_ids[part], self.logprobs[part], self.token_logprobs[part])

    @property
    def k(self) -> int:
        return int(self.token_ids.shape[1])


def kl_divergence(scored: npt.NDArray[np.int32], reference: Tops, candidate: Tops) -> Float64Array:
    """The divergence at each position, in nats, at least 0. `scored`: token ids [n]."""
    parts = [
        _divergence(scored[part], reference.rows(part), candidate.rows(part))
        for part in _parts(len(scored), reference.k * candidate.k)
    ]
    return np.concatenate([*parts, np.empty(0)])


def top1_agrees(reference: Tops, candidate: Tops) -> npt.NDArray[np.bool_]:
    """Whether both name the same likeliest token, at each position."""
    agrees: npt.NDArray[np.bool_] = reference.token_ids[:, 0] == candidate.token_ids[:, 0]
    return agrees


def _parts(num_rows: int, pairs_per_row: int) -> Iterator[slice]:
    size = max(1, _MAX_PAIRS // pairs_per_row)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _divergence(scored: npt.NDArray[np.int32], reference: Tops, candidate: Tops) -> Float64Array:
    # [n, k of reference, k of candidate]: the same token in both lists, at most once in a row.
    is_same = reference.token_ids[:, :, None] == candidate.token_ids[:, None, :]
    is_shared = is_same.any(axis=2)
    place = is_same.argmax(axis=2)
    log_p = reference.logprobs.astype(np.float64)
    log_q = np.take_along_axis(candidate.logprobs, place, axis=1).astype(np.float64)
    # The scored token has its logprob in both, also where only one of them lists it.
    is_listed = (is_shared & (reference.token_ids == scored[:, None])).any(axis=1)
    log_p = np.concatenate([log_p, reference.token_logprobs[:, None]], axis=1, dtype=np.float64)
    log_q = np.concatenate([log_q, candidate.token_logprobs[:, None]], axis=1, dtype=np.float64)
    is_event = np.concatenate([is_shared, ~is_listed[:, None]], axis=1)
    is_event &= np.isfinite(log_p) & np.isfinite(log_q)  # what one rules out is in the rest
    log_p, log_q = (np.where(is_event, log, -np.inf) for log in (log_p, log_q))
    p, q = np.exp(log_p), np.exp(log_q)
    events = (p * np.subtract(log_p, log_q, where=is_event, out=np.zeros_like(p))).sum(axis=1)
    rest_p = np.maximum(1 - p.sum(axis=1), _MIN_MASS)
    rest_q = np.maximum(1 - q.sum(axis=1), _MIN_MASS)
    divergence: Float64Array = events + rest_p * np.log(rest_p / rest_q)
    return np.maximum(divergence, 0.0)
