"""What a run has cost: money by the clock, energy by the devices' own meters.

Both are attributed to the tokens of the run's results, whatever else they paid for: loading the
model, reading prompts, other processes on the same device. Must not know: rows, engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any

from batchinfer.engine.hardware import gpu_joules


class Spent:
    """Begins with the run, or before it with the process."""

    def __init__(self, price_per_hour: float | None) -> None:
        self._price_per_hour = price_per_hour
        self._begun_joules = gpu_joules()
        self._joules: float | None = None

    def read(self, devices: Sequence[int]) -> None:
        """Read the meters of the devices that engines run on, by their index among the visible.

        Asks the driver, which may hang with its device: nothing that ends a run calls it.
        """
        meters = zip(self._begun_joules, gpu_joules(), strict=False)
        all_used = dict(enumerate(now - begun for begun, now in meters))
        used = [all_used[index] for index in devices if index in all_used]
        if used and len(used) == len(devices) and not any(map(isnan, used)):
            self._joules = max(0.0, sum(used))

    def as_dict(self, seconds: float, num_tokens: int, of_tokens: str) -> dict[str, Any] | None:
        """Of a run that takes `seconds` so far and has `num_tokens`; None: nothing is known.

        JSON-ready, with a line for people as its `text`. `of_tokens`: what the task calls them.
        """
        found: dict[str, Any] = {}
        words = []
        thousands = num_tokens / 1000
        if self._price_per_hour is not None:
            cost = seconds / 3600 * self._price_per_hour
            found["cost"] = _digits(cost)
            found["cost_per_1000_tokens"] = _digits(cost / thousands) if thousands else None
            words.append(f"cost {_shown(cost)} at {self._price_per_hour:g} an hour")
            if thousands:
                words[-1] += f", {_shown(cost / thousands)} for 1,000 {of_tokens}"
        if self._joules is not None:
            found["joules"] = round(self._joules, 1)
            per_thousand = self._joules / thousands if thousands else None
            found["joules_per_1000_tokens"] = _digits(per_thousand) if per_thousand else None
            words.append(f"{self._joules:,.0f} J of the device")
            if per_thousand:
                words[-1] += f", {_shown(per_thousand)} J for 1,000 {of_tokens}"
        if not words:
            return None
        return {**found, "text": f"{'; '.join(words)} (all of it attributed to them)"}


def _digits(amount: float) -> float:
    """With six digits, however small."""
    return float(f"{amount:.6g}")


def _shown(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"
