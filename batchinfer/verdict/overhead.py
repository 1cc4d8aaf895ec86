"""What a step costs whatever it holds, from steps of several sizes. Must not know: models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: The largest steps hold this many times what the smallest do, or nothing is concluded.
_LEAST_SPREAD = 1.5


class Sized(NamedTuple):
    """Steps of about one size; what they hold is in any unit that their time grows with."""

    num_steps: float
    held: float
    seconds: float


def step_overhead(sized: Sequence[Sized]) -> float | None:
    """Seconds a step of the straight line through them, both parts not negative.

    None where they are too much alike.
    """
    points = [(s.num_steps, s.held / s.num_steps, s.seconds / s.num_steps) for s in sized]
    sizes = [held for _, held, _ in points if held > 0]
    if not sizes or max(sizes) < _LEAST_SPREAD * min(sizes):
        return None
    weight = sum(num_steps for num_steps, _, _ in points)
    mean_held = sum(n * held for n, held, _ in points) / weight
    mean_s = sum(n * seconds for n, _, seconds in points) / weight
    spread = sum(n * (held - mean_held) ** 2 for n, held, _ in points)
    together = sum(n * (held - mean_held) * (seconds - mean_s) for n, held, seconds in points)
    slope = max(0.0, together / spread) if spread else 0.0
    return max(0.0, mean_s - slope * mean_held)
