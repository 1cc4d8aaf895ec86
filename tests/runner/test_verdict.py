"""What the loop tells of its steps, as the verdict reads it."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest

from batchinfer.config import Job, SamplingSettings
from batchinfer.engine.base import Answer, Request
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.plan import Chunk, WorkItem
from batchinfer.runner.loop import Loop
from batchinfer.telemetry import Clock, Counters, Tally
from batchinfer.testing import FakeEngine, FakePlan
from tests.support.jobs import Place
from tests.support.jobs import job as job_settings

PROMPT_TOKENS = 5


class Counting(FakeEngine):
    """Computes what it takes in whole, then a token of each sequence in a step."""

    num_tokens_computed = 100  # of a trial before the first row

    def add(self, request: Request) -> None:
        super().add(request)
        self.num_tokens_computed += len(request.token_ids)

    def step(self) -> list[Answer]:
        answers = super().step()
        self.num_tokens_computed += self.num_running
        return answers


class Given:
    """So many rows at a time, each time that the engine has nothing to do."""

    planned_s = 0.0

    def __init__(self, *portions: int) -> None:
        self._portions = deque(portions)
        self._items: deque[WorkItem] = deque()
        self.wait(0.0)

    def take(self) -> WorkItem | None:
        return self._items.popleft() if self._items else None

    @property
    def is_exhausted(self) -> bool:
        return not self._items and not self._portions

    def wait(self, timeout_s: float) -> bool:
        time.sleep(timeout_s / 100)
        if self._portions and not self._items:
            rows = np.zeros(PROMPT_TOKENS, dtype=np.int32)
            chunk = Chunk.of_prompts([rows] * self._portions.popleft(), num_samples=1)
            self._items.extend(WorkItem(chunk, index, 0) for index in range(len(chunk.rows)))
        return bool(self._items)


def tally_of(ready: Given, *, max_tokens: int = 4, counts: bool = True) -> Tally:
    counters = Counters(Clock())
    demand = CompletionDemand("generate", SamplingSettings(max_tokens=max_tokens))
    engine = (Counting if counts else FakeEngine)(
        FakePlan(max_num_seqs=8, step_s=0.001), demand, max_model_len=64
    )
    job = Job.model_validate(job_settings(Place("nowhere")))
    loop = Loop(
        engine,
        ready,  # type: ignore[arg-type]
        lambda results: None,
        counters,
        job=job,
        should_stop=lambda: False,
    )
    loop.run()
    return counters.tally


def seconds_of(tally: Tally) -> dict[str, float]:
    found: dict[str, float] = {}
    for steps in tally.steps():
        found[steps.kind] = found.get(steps.kind, 0.0) + steps.seconds
    return found


def test_rows_that_come_one_by_one_starve_the_engine_until_the_last() -> None:
    tally = tally_of(Given(1, 1, 1, 1, 1))
    num_steps = {steps.kind: steps.num_steps for steps in tally.steps()}
    assert num_steps["starved"] == 4 * num_steps["tail"]


def test_rows_that_are_all_there_fill_steps_and_leave_a_tail() -> None:
    seconds = seconds_of(tally_of(Given(64 + 2)))
    assert seconds.keys() >= {"full"}
    assert "starved" not in seconds


@pytest.mark.parametrize("counts", [True, False])
def test_tokens_are_the_requests_and_where_it_says_so_the_steps(counts: bool) -> None:
    tally = tally_of(Given(20), counts=counts)
    assert (tally.tokens.num_requests, tally.tokens.prompt) == (20, 20 * PROMPT_TOKENS)
    running = sum(steps.running for steps in tally.steps())
    assert running == tally.tokens.completion
    by_step = sum(steps.tokens for steps in tally.steps())
    assert by_step == (20 * PROMPT_TOKENS + running if counts else 0)


def test_time_in_steps_and_between_them_is_apart() -> None:
    tally = tally_of(Given(40))
    num_steps = sum(steps.num_steps for steps in tally.steps())
    assert sum(seconds_of(tally).values()) >= 0.001 * num_steps
    assert tally.host_s > 0
