"""What the steps of an engine say of a run: how full they were, and how long it stood still.

Must not know: rows, requests, what is admitted when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from batchinfer.engine.base import Answer, CountingEngine, Engine
from batchinfer.runner.width.search import Stepped
from batchinfer.telemetry import Counters

#: How often tokens of unfinished rows are counted: 0.1 ms for 1,000 of them.
_COUNT_EVERY_S = 0.5
#: A step that runs fewer than this share of the sequences it could run is underfilled.
_FULL_SHARE = 0.9


class StepCounts:
    """Of one engine. Used by its thread."""

    def __init__(self, engine: Engine, counters: Counters) -> None:
        self._engine = engine
        self._counters = counters
        self._clock = counters.clock
        # Not counted yet: whether rows were left, or the reader found none to compute, shows later.
        self._num_steps = self._num_underfilled = 0
        self._stalled_s = 0.0
        self._begun_s = self._waited_s = 0.0  # of the step that runs; what was waited before it
        self._counted_s = -math.inf
        self._counting = engine if isinstance(engine, CountingEngine) else None
        # That the engine had computed by the last step; a trial may have come before the first.
        self._num_tokens = self._counting.num_tokens_computed if self._counting else 0
        self._tally = counters.tally
        self._ended_s = self._clock.monotonic()
        self.set_width(engine.facts.max_num_seqs)

    def set_width(self, width: int) -> None:
        """How many sequences run in a full step, from the next on."""
        self._num_full = _FULL_SHARE * width
        self._tally.set_sizes(width, self._engine.facts.max_num_batched_tokens)

    def admitting(self) -> None:
        """A request is admitted: rows were left while the steps before it ran."""
        if self._num_steps:
            self._counters.add_steps_with_more(self._num_steps, self._num_underfilled)
            self._num_steps = self._num_underfilled = 0
            self._tally.add_admission()

    def stepping(self) -> None:
        """A step begins: what was waited for before it, the engine stood still."""
        self._counters.add_stalled(self._stalled_s)
        self._waited_s, self._stalled_s = self._stalled_s, 0.0
        self._begun_s = self._clock.monotonic()

    def stepped(self, num_given: int, *, is_held: bool) -> Stepped:
        """A step is done, with `num_given` requests in flight; few, on purpose, if it `is_held`."""
        ended_s = self._clock.monotonic()
        # Where some had to wait, the engine had no room for more (sequences, tokens or KV cache).
        num_running = self._engine.num_running
        self._counters.add_step(num_running)
        self._num_steps += 1
        is_few = num_given <= num_running < self._num_full and not is_held
        self._num_underfilled += is_few
        num_tokens = self._tokens_of_step()
        self._tally.add_step(
            num_running,
            num_tokens,
            is_few=is_few,
            is_held=is_held,
            begun_s=self._begun_s,
            ended_s=ended_s,
            stalled_s=self._waited_s,
        )
        seconds = max(0.0, ended_s - self._ended_s - self._waited_s)
        self._ended_s = ended_s
        return Stepped(num_given, num_running, num_tokens, seconds)

    def answered(self, num_prompt_tokens: int, answer: Answer) -> None:
        """A request is answered; one with an error counts for nothing."""
        if answer.error_type is None:
            self._tally.add_answer(num_prompt_tokens, *answer.tokens())

    def _tokens_of_step(self) -> int:
        """0 where the engine does not say."""
        if self._counting is None:
            return 0
        before, self._num_tokens = self._num_tokens, self._counting.num_tokens_computed
        return self._num_tokens - before

    def count_tokens(self) -> None:
        """Count the tokens of unfinished rows, if that is some time ago."""
        now_s = self._clock.monotonic()
        if now_s >= self._counted_s + _COUNT_EVERY_S:
            self._counted_s = now_s
            self._counters.set_tokens_in_flight(self._engine.num_tokens_in_flight())

    def add_stall(self, seconds: float) -> None:
        """Time that the engine stands still, if another step follows."""
        self._stalled_s += seconds

    @contextmanager
    def stall(self) -> Iterator[None]:
        """As `add_stall`, of what is done in it."""
        begun_s = self._clock.monotonic()
        yield
        self._stalled_s += self._clock.monotonic() - begun_s
