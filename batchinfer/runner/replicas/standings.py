"""What the engines of all replicas did together, for one verdict. Must not know: who is alive."""

from __future__ import annotations

from dataclasses import replace

from batchinfer.runner.replicas.messages import Stands
from batchinfer.telemetry import Tallied
from batchinfer.verdict import Setup


class Standings:
    """The last that each process said; one that died did what it did."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Stands] = {}

    def hear(self, label: str, start: int, stands: Stands) -> tuple[Setup, Tallied]:
        """From the replica of that label, by its number of starts. -> all of them together.

        They are of one kind, so one setup is that of each.
        """
        self._last[label, start] = stands
        num_replicas = len({label for label, _ in self._last})
        setup = stands.setup
        if num_replicas > 1:
            setup = replace(setup, device=f"{num_replicas} x {setup.device}")
        return setup, sum((last.tallied for last in self._last.values()), Tallied())
