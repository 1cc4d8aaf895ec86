"""The fake as an engine that a job names, once it is registered: `engine: {name: fake}`.

Must not know: any other engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from batchinfer.config import ENGINES, Job
from batchinfer.engine.base import Demand, Engine, EngineKind, EngineSpec, Finding, Placement
from batchinfer.engine.kinds import KINDS, demands_in
from batchinfer.errors import ConfigError, MemoryHeld
from batchinfer.quantization import Machine
from batchinfer.testing import demands
from batchinfer.testing.engine import FakeEngine, FakePlan


def register(name: str, kind: EngineKind) -> None:
    """Let the jobs of this process name an engine.

    Example: `register("fake", fake_kind(FakePlan(max_num_seqs=8)))`
    """
    if name not in ENGINES:
        ENGINES.append(name)
    KINDS[name] = lambda: kind


def fake_kind(plan: FakePlan | None = None) -> FakeKind:
    """The kind whose engines behave as `plan` says."""
    plan = plan or FakePlan()

    def build(spec: EngineSpec) -> FakeEngine:
        if plan.fail_build:
            os.write(2, b"loading\n")  # as engines do, beside our streams
            raise ConfigError(plan.fail_build)
        if plan.is_held:
            raise MemoryHeld("others hold the memory of the fake device")
        return FakeEngine(plan, spec.demand, max_model_len=spec.model.max_model_len)

    return FakeKind(build)


@dataclass(frozen=True, slots=True)
class FakeKind:
    """A kind for engines without a model: it runs anywhere, and has no options."""

    make: Callable[[EngineSpec], Engine]
    wants: Collection[str] = demands_in(demands)

    def machine(self) -> Machine:
        return Machine(None, engine="batchinfer.testing")

    def packages(self) -> Iterable[str]:
        return ()

    def check(self, job: Job, demand: Demand) -> None:
        for name in job.engine.options:
            raise ConfigError(f"engine.options.{name}: the engine {job.engine.name} has no options")

    def deciding_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict(options)

    def needs_weights(self, job: Job) -> bool:
        return False

    def placements(self, job: Job) -> Sequence[Placement]:
        devices = job.engine.devices
        num_replicas = devices if isinstance(devices, int) else 1
        if num_replicas == 1:
            return [Placement("fake")]
        return [Placement(f"fake {n}", {"FAKE_DEVICE": str(n)}) for n in range(num_replicas)]

    def num_gpus(self, job: Job) -> int:
        return 0

    def check_fit(self, spec: EngineSpec) -> None:
        pass

    def describe_memory(self, spec: EngineSpec) -> list[str]:
        return []

    def examine(self) -> Iterable[Finding]:
        return [Finding("engine", "a fake, without a model")]

    def prepare(self, spec: EngineSpec) -> None:
        pass

    def load(self) -> None:
        pass

    def phases(self, report: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def build(self, spec: EngineSpec) -> Engine:
        return self.make(spec)
