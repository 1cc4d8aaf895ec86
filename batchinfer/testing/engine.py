"""A deterministic engine without a model, never reachable from the program.

An answer (`demands/`) depends on its request alone, so a resumed run must equal an uninterrupted
one. Faults are asked for by `FakePlan`. Must not know: what is asked and answered.
"""

from __future__ import annotations

import heapq
import importlib
import logging
import os
import signal
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from batchinfer.engine.base import Answer, Demand, EngineFacts, Request
from batchinfer.errors import EngineDied, RowError


@dataclass(frozen=True, slots=True)
class FakePlan:
    """How the fake behaves."""

    max_num_seqs: int = 64
    step_s: float = 0.0  # sleep in each step
    build_s: float = 0.0  # sleep while "loading"
    die_at_step: int | None = None  # raise EngineDied
    kill_at_step: int | None = None  # SIGKILL our own process
    kill_at_tokens: int | None = None  # SIGKILL at a prompt of so many tokens or more
    hang_at_step: int | None = None  # sleep for an hour in a step
    can_narrow: bool = True  # as vLLM 0.32 can
    reject_every: int = 0  # refuse every n-th request
    fail_build: str | None = None  # raise ConfigError with this message
    is_held: bool = False  # raise MemoryHeld while "loading"
    warn: str | None = None  # warn of this while "loading"
    text: str | None = None  # of every completion
    thought: str | None = None  # before it, which one that is cut ends within
    log_file: str | None = None  # append one line a request: the crc of its prompt


class Answers(Protocol):
    """What the fake answers to one kind of demand: `ANSWERS` of each module of `demands/`."""

    def num_steps(self, request: Request) -> int:
        """How many steps a request takes, at least one."""

    def answer(self, request: Request, num_steps: int) -> Answer:
        """What it has after so many of them."""


def answers_of(demand: Demand, plan: FakePlan) -> Answers:
    """Those of a demand for which there is a module."""
    module = importlib.import_module(f"batchinfer.testing.demands.{demand.wants}")
    of: Callable[[Demand, FakePlan], Answers] = module.ANSWERS
    return of(demand, plan)


class FakeEngine:
    """See `Engine` for the contract."""

    def __init__(self, plan: FakePlan, demand: Demand, *, max_model_len: int) -> None:
        if plan.warn:
            logging.getLogger("batchinfer.fake").warning("%s", plan.warn)
        time.sleep(plan.build_s)
        self._plan = plan
        self._answers = answers_of(demand, plan)
        self._waiting: deque[Request] = deque()
        self._running: list[tuple[int, int, Request]] = []  # (last step, key, request)
        self._step = 0
        self._num_running = 0
        self._width = plan.max_num_seqs
        self.num_added = 0
        self.is_closed = False
        self.facts = EngineFacts(
            name="fake",
            version="0",
            device="none",
            dtype="float32",
            quantization="none",
            max_model_len=max_model_len,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=8192,
            kv_cache_tokens=None,
        )

    def num_tokens_in_flight(self) -> int:
        begun = (end + 1 - self._answers.num_steps(request) for end, _, request in self._running)
        return sum(max(0, 1 + self._step - first) for first in begun)

    @property
    def num_running(self) -> int:
        return self._num_running

    def add(self, request: Request) -> None:
        self.num_added += 1
        if self._plan.log_file:
            with open(self._plan.log_file, "a") as log:  # noqa: PTH123
                log.write(f"{zlib.crc32(request.token_ids.tobytes())}\n")
        if self._plan.kill_at_tokens and len(request.token_ids) >= self._plan.kill_at_tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._plan.reject_every and self.num_added % self._plan.reject_every == 0:
            raise RowError("engine_rejected", "the fake engine refuses this request")
        self._waiting.append(request)

    def step(self) -> list[Answer]:
        self._step += 1
        if self._step == self._plan.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._step == self._plan.die_at_step:
            raise EngineDied("the fake engine died as it was told to")
        if self._step == self._plan.hang_at_step:
            time.sleep(3600)
        if self._plan.step_s:
            time.sleep(self._plan.step_s)
        while self._waiting and len(self._running) < self._width:
            request = self._waiting.popleft()
            last = self._step + self._answers.num_steps(request) - 1
            heapq.heappush(self._running, (last, request.key, request))
        self._num_running = len(self._running)
        done = []
        while self._running and self._running[0][0] <= self._step:
            request = heapq.heappop(self._running)[2]
            done.append(self._answers.answer(request, self._answers.num_steps(request)))
        return done

    def so_far(self, key: int) -> Answer | None:
        for last, other, request in self._running:
            if other == key:
                num_left = last - self._step
                return self._answers.answer(request, self._answers.num_steps(request) - num_left)
        return None

    def abort(self, key: int) -> None:
        self._running = [entry for entry in self._running if entry[1] != key]
        heapq.heapify(self._running)
        self._waiting = deque(request for request in self._waiting if request.key != key)

    def set_width(self, width: int) -> bool:
        if self._plan.can_narrow:
            self._width = width
        return self._plan.can_narrow

    def set_demand(self, demand: Demand) -> None:
        self._answers = answers_of(demand, self._plan)

    def close(self) -> None:
        self.is_closed = True
