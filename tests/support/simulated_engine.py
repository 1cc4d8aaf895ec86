"""An engine's steps by arithmetic: rows that run, are prefilled and end, and what a step takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from batchinfer.runner.width.search import Stepped, WidthSearch


@dataclass
class Simulated:
    """`seconds_of`: of a step with so many sequences and prompt tokens."""

    seconds_of: Callable[[int, int], float]
    prompt_tokens: int = 100
    completion_tokens: int = 50  # mean; geometric, so some are much longer
    noise: float = 0.0  # relative, and one step in 50 takes three times as long
    num_rows: int = 1_000_000
    room: int = 1_000_000  # sequences that the KV cache holds
    max_step_tokens: int = 16_384
    seed: int = 0
    running: list[int] = field(default_factory=list)  # tokens that are left of each sequence

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def step(self, width: int) -> Stepped:
        prompts = 0
        width = min(width, self.room)
        self.running = [left - 1 for left in self.running if left > 1]
        budget = self.max_step_tokens - len(self.running)
        while len(self.running) < width and self.num_rows and prompts + 1 < budget:
            self.num_rows -= 1
            prompts += self.prompt_tokens
            left = 1 + int(self._random.expovariate(1 / self.completion_tokens))
            self.running.append(min(left, 10 * self.completion_tokens))
        seconds = self.seconds_of(len(self.running), prompts)
        if self.noise:
            seconds *= 1 + abs(self._random.gauss(0, self.noise))
            seconds *= 3 if self._random.random() < 0.02 else 1
        waiting = min(self.num_rows, 256)
        num_tokens = len(self.running) + prompts
        return Stepped(len(self.running) + waiting, len(self.running), num_tokens, seconds)

    def search(self, search: WidthSearch) -> WidthSearch:
        """Until it is over."""
        while not search.is_over:
            search.add(self.step(search.width))
        return search

    def rows_per_s(self, width: int) -> float:
        """Of full steps at this width, in the mean."""
        ending = width / self.completion_tokens
        seconds = self.seconds_of(min(width, self.room), round(ending * self.prompt_tokens))
        return ending / seconds
