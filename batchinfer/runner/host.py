"""What a run is given by the program it runs in. Must not know: the job, how rows are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from batchinfer.runner.stop import Stop
from batchinfer.runner.tuning import Tuning
from batchinfer.storage import Store
from batchinfer.telemetry import Clock, Counters, StartUp


def _no_log(store: Store, run: int) -> None:
    """Messages go where the program sends them."""


@dataclass(frozen=True, slots=True)
class Host:
    """Made by the caller before the run, and looked at by it while the run works.

    Several runs may live in one program, each with a Host of its own: nothing here reaches
    beyond the run, unless the caller passes a `tuning` or a `log` that does.
    """

    counters: Counters
    stop: Stop = field(default_factory=Stop)
    startup: StartUp = field(default_factory=StartUp)
    tuning: Tuning = field(default_factory=Tuning)
    log: Callable[[Store, int], None] = _no_log  # open it: the run has a number

    @property
    def clock(self) -> Clock:
        return self.counters.clock
