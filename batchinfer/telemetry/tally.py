"""What a run's steps had to do, counted as they happen: a few sums for steps of about one size.

One thread adds, any may look. Must not know: models, devices. Invariant: a step costs about a
microsecond here and a request less, whatever it holds; nothing is counted for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

#: full: as many sequences, or tokens, as a step may have. short: more were given to the engine than
#: it ran. held: few were admitted on purpose. starved: few were there, and more came later. tail:
#: few were there, and no more came.
Kind = Literal["full", "short", "held", "starved", "tail"]

#: A step with this share of the sequences, or tokens, that it may have is full.
FULL_SHARE = 0.9
_KEPT_BITS = 4


@dataclass(slots=True)
class Steps:
    """Steps of one kind and about one size, with their sums."""

    kind: Kind
    num_steps: int = 0
    running: int = 0  # sequences, once a step
    tokens: int = 0  # computed; 0 where the engine does not say
    seconds: float = 0.0

    def add(self, other: Steps) -> None:
        self.num_steps += other.num_steps
        self.running += other.running
        self.tokens += other.tokens
        self.seconds += other.seconds


@dataclass(slots=True)
class Tokens:
    """Sums over the requests that were answered. Context: tokens of the sequence up to and with
    the one that is computed.
    """

    num_requests: int = 0
    prompt: int = 0  # computed
    cached: int = 0  # found in the prefix cache
    completion: int = 0
    prompt_context: int = 0  # summed over the computed tokens of prompts
    completion_context: int = 0  # summed over the tokens of completions but the last, which is
    # never read, so that a request decodes one step less than it has tokens

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def computed(self) -> int:
        return self.prompt + self.decoded

    @property
    def decoded(self) -> int:
        """Steps of decoding: the first token of a completion comes with its prompt."""
        return max(0, self.completion - self.num_requests)


@dataclass(frozen=True, slots=True)
class Tallied:
    """What a tally had at a moment: of one engine, or of several together."""

    steps: Sequence[Steps] = ()
    tokens: Tokens = field(default_factory=Tokens)
    host_s: float = 0.0  # between steps, without what was waited for
    stalled_s: float = 0.0  # between steps, for input or storage

    def __add__(self, other: Tallied) -> Tallied:
        return Tallied(
            [*self.steps, *other.steps],
            self.tokens + other.tokens,
            self.host_s + other.host_s,
            self.stalled_s + other.stalled_s,
        )


class Tally:
    """See the module."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.host_s = 0.0  # see `Tallied`
        self.stalled_s = 0.0
        self._steps: dict[tuple[Kind, int, int], Steps] = {}
        self._few: dict[int, Steps] = {}  # whether more rows come is not known yet
        self._ended_s: float | None = None
        self._full_running = self._full_tokens = 0.0

    def set_sizes(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Of the engine whose steps are counted from now on."""
        self._full_running = FULL_SHARE * max_num_seqs
        self._full_tokens = FULL_SHARE * max_num_batched_tokens

    def add_step(
        self,
        running: int,
        tokens: int,
        *,
        is_few: bool,
        is_held: bool,
        begun_s: float,
        ended_s: float,
        stalled_s: float,
    ) -> None:
        """`is_few`: all that was admitted ran, and more could have. `is_held`: few are admitted on
        purpose. `stalled_s`: waited for input or storage since the step before. The times are of a
        monotonic clock.
        """
        if self._ended_s is not None:
            self.host_s += max(0.0, begun_s - self._ended_s - stalled_s)
        self._ended_s = ended_s
        self.stalled_s += stalled_s
        size = _bucket(running)
        if is_few:
            steps = self._few.get(size)
            if steps is None:
                steps = self._few[size] = Steps("tail")
        else:
            kind: Kind = "held" if is_held else "full"
            if not is_held and running < self._full_running and tokens < self._full_tokens:
                kind = "short"
            key = (kind, size, _bucket(tokens))
            steps = self._steps.get(key)
            if steps is None:
                steps = self._steps[key] = Steps(kind)
        steps.num_steps += 1
        steps.running += running
        steps.tokens += tokens
        steps.seconds += ended_s - begun_s

    def add_admission(self) -> None:
        """Another request is admitted: the steps with few were not the last ones."""
        if not self._few:
            return
        for size, steps in self._few.items():
            steps.kind = "starved"
            self._steps.setdefault(("starved", size, 0), Steps("starved")).add(steps)
        self._few = {}

    def add_answer(self, prompt: int, cached: int, completion: int) -> None:
        """Tokens of a request that ended."""
        tokens = self.tokens
        computed, decoded = prompt - cached, max(0, completion - 1)
        tokens.num_requests += 1
        tokens.prompt += computed
        tokens.cached += cached
        tokens.completion += completion
        tokens.prompt_context += computed * cached + computed * (computed + 1) // 2
        tokens.completion_context += decoded * prompt + decoded * (decoded + 1) // 2

    def so_far(self) -> Tallied:
        """Not changed by what comes."""
        steps = [replace(steps) for steps in self.steps()]
        return Tallied(steps, replace(self.tokens), self.host_s, self.stalled_s)

    def steps(self) -> list[Steps]:
        """Of this moment."""
        return [*list(self._steps.values()), *list(self._few.values())]


def _bucket(size: int) -> int:
    """The same for sizes that agree in their highest bits."""
    shift = size.bit_length() - _KEPT_BITS
    return size if shift <= 0 else size >> shift << shift
