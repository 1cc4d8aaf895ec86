"""A run on an engine that is fastest at a known width, with a clock that only its steps move."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from batchinfer.config import load_job
from batchinfer.engine.base import Answer, EngineSpec, Request
from batchinfer.engine.kinds import KINDS
from batchinfer.prompt import encode
from batchinfer.runner import Host, RunOptions, run_job
from batchinfer.telemetry import Clock, Counters, Outcome
from batchinfer.testing import FakeEngine, FakePlan, LightTokenizer
from batchinfer.testing.kind import FakeKind


class SteppedClock(Clock):
    """Stands still, but for steps."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        super().__init__(monotonic_ns=lambda: self.now_ns)


class KneeEngine(FakeEngine):
    """Steps with more than `knee` sequences take longer than two with half as many."""

    num_tokens_computed = 0

    def __init__(self, plan: FakePlan, spec: EngineSpec, clock: SteppedClock, knee: int) -> None:
        super().__init__(plan, spec.demand, max_model_len=spec.model.max_model_len)
        self._clock, self._knee = clock, knee
        self.most_running = 0

    def add(self, request: Request) -> None:
        super().add(request)
        self.num_tokens_computed += len(request.token_ids)

    def step(self) -> list[Answer]:
        answers = super().step()
        self.num_tokens_computed += self.num_running
        self.most_running = max(self.most_running, self.num_running)
        over = max(0, self.num_running - self._knee)
        self._clock.now_ns += int(1e9 * (0.05 + 0.002 * self.num_running + 0.02 * over))
        return answers


class Uncounted(KneeEngine):
    """Its core runs in another process."""

    num_tokens_computed = property(lambda self: 0, lambda self, value: None)  # type: ignore[assignment]


def run_with_knee(
    path: Path,
    *,
    knee: int = 24,
    kind: type[KneeEngine] = KneeEngine,
    can_narrow: bool = True,
    sets: list[str] | None = None,
) -> tuple[Outcome, KneeEngine]:
    """`engine.tune: true`."""
    clock, engines = SteppedClock(), []
    plan = FakePlan(max_num_seqs=64, can_narrow=can_narrow)

    def make(spec: EngineSpec) -> Any:
        engines.append(kind(plan, spec, clock, knee))
        return engines[-1]

    with (
        mock.patch.object(encode, "_load", lambda path, **_: LightTokenizer(path)),
        mock.patch.dict(KINDS, {"vllm": lambda: FakeKind(make)}),
    ):
        job = load_job(str(path), ["engine.tune=true", *(sets or [])]).job
        outcome = run_job(job, RunOptions(), Host(Counters(clock)))
    return outcome, engines[0]
