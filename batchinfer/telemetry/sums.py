"""What one of several processes that share a run has done: sums for machines, a line for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sums:
    """What one of several processes that share a run has done so far."""

    phase: str = "starting"
    rows_computed: int = 0
    rows_durable: int = 0
    rows_failed: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    result_tokens: int = 0
    num_in_flight: int = 0
    tokens_in_flight: int = 0
    tokens_per_s: float = 0.0  # over the last WINDOW_S
    num_steps: int = 0
    num_running: int = 0  # summed over the steps
    num_steps_with_more: int = 0
    num_steps_underfilled: int = 0
    stalled_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaLine:
    """How one replica stands, for people."""

    label: str
    phase: str
    rows_computed: int  # since its process was started
    num_in_flight: int
    tokens_per_s: float
    num_restarts: int


def line_of(label: str, sums: Sums, num_restarts: int) -> ReplicaLine:
    """How the replica of that label stands."""
    return ReplicaLine(
        label=label,
        phase=sums.phase,
        rows_computed=sums.rows_computed,
        num_in_flight=sums.num_in_flight,
        tokens_per_s=round(sums.tokens_per_s, 1),
        num_restarts=num_restarts,
    )
