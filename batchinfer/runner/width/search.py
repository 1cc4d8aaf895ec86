"""The search for the width at which rows cost least: how many sequences run at once. Pure.

Told of each step, it says at which width the next shall run. Widths are tried upwards, as more
sequences join at once, while fewer have to finish first: each is settled, and then measured in
slices of some steps. One that looks better than the widest is tried again in turn with it, then
what lies between it and its neighbours. What a slice took is divided by its work: a generated token
counts one, a prompt's what it costs beside that in this very run, so slices with many prompts, as
after each widening, compare with others.

Must not know: rows, engines, clocks. Invariant: another width than the widest is found only if it
was better by more than chance, and by `MARGIN` in two visits or by `LARGE_MARGIN` in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

#: A width has to be so much better than the widest, which is what runs without a search.
MARGIN = 0.03
#: ... or so much, where there was no time to see it twice.
LARGE_MARGIN = 0.1
BUDGET_S = 60.0
#: Fewer sequences than this are not tried, nor less than a 16th of the most.
LEAST_WIDTH = 8
_NUM_HALVINGS = 4
_NUM_VISITS = 3  # of the widest, and of one that is better
#: What lies between two widths is tried while they are further apart than this.
_LEAST_RATIO = 1.3
_REACHED = 0.95  # of a width: it is settled
_NUM_STEPS_TO_SETTLE = 2  # after it is reached; where steps overlap, the last is of the one before
_NUM_STEPS_STUCK = 8  # without one more sequence: the engine has no room, or there are no rows
_SLICE_STEPS, _SLICE_S = 8, 0.25
_LONG_SLICE_S = 1.7  # of however few steps
_VISIT_SLICES, _VISIT_S = 3, 1.0
_LONGEST_VISIT_S = 5.0
_GROUP_STEPS = 4
_USUAL_PROMPT_COST = 0.3


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step of an engine."""

    num_given: int  # requests that it had, running or waiting
    num_running: int  # sequences
    num_tokens: int  # computed, prompts included
    seconds: float  # since the step before ended, without what was waited for


@dataclass(slots=True)
class _Sum:
    """Several steps together."""

    num_steps: int = 0
    seconds: float = 0.0
    generated: int = 0  # tokens: one for each sequence and step
    prompt: int = 0  # all other tokens

    def add(self, step: Stepped) -> None:
        self.num_steps += 1
        self.seconds += step.seconds
        self.generated += step.num_running
        self.prompt += max(0, step.num_tokens - step.num_running)

    @property
    def is_whole(self) -> bool:
        is_usual = self.num_steps >= _SLICE_STEPS and self.seconds >= _SLICE_S
        return is_usual or self.seconds >= _LONG_SLICE_S


@dataclass(slots=True)
class _Measured:
    """What is known of a width."""

    slices: list[_Sum] = field(default_factory=list)
    num_visits: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """`width`: at which the rows shall run. `speeds`: by width, of the widest that was measured."""

    width: int
    speeds: Mapping[int, float]
    seconds: float
    is_decided: bool  # else time or rows ended before it was sure
    has_widest: bool  # it was measured
    has_room: bool  # for the widest; else so many as the last of `speeds` ran at most

    @property
    def gain(self) -> float:
        """Over the widest, if that was measured."""
        return self.speeds.get(self.width, 1.0) - 1.0


def widths_up_to(most: int, graph_width: int | None = None) -> list[int]:
    """What is tried first, upwards: halvings of `most`, and the widest that graphs cover."""
    found = {most}
    for halving in range(1, _NUM_HALVINGS + 1):
        if (width := on_grid(most / 2**halving)) >= LEAST_WIDTH:
            found.add(width)
    if graph_width is not None and LEAST_WIDTH <= graph_width < most:
        found = {w for w in found if w == most or not 0.8 < w / graph_width < 1.25}
        found.add(graph_width)
    return sorted(found)


def on_grid(width: float) -> int:
    """The next lower size that engines capture graphs of: others are padded up to one."""
    step = 8 if width <= 256 else 16 if width <= 512 else 32
    return int(width) // step * step


class WidthSearch:
    """See the module."""

    def __init__(
        self, most: int, graph_width: int | None = None, *, budget_s: float = BUDGET_S
    ) -> None:
        """`most`: the engine's max_num_seqs. `graph_width`: as in `Running`."""
        self._ladder = widths_up_to(most, graph_width)
        self._most = self._top = most
        self._budget_s = budget_s
        self._measured: dict[int, _Measured] = {}
        self._groups: list[_Sum] = [_Sum()]
        self.spent_s = 0.0
        self.num_visits = 0
        self.is_over = len(self._ladder) < 2
        self._is_decided = False
        self.width = most if self.is_over else self._ladder.pop(0)
        # Of the visit: what is being measured, what was, and how far it is settled.
        self._slice = _Sum()
        self._slices: list[_Sum] = []
        self._is_reached = self._is_stuck = False
        self._num_settled = self._num_stuck = 0
        self._num_running: int | None = None

    def add(self, step: Stepped) -> None:
        """A step that ran with `width`, or on the way there."""
        if self.is_over:
            return
        self.spent_s += step.seconds
        if self._groups[-1].num_steps == _GROUP_STEPS:
            self._groups.append(_Sum())
        self._groups[-1].add(step)
        if not self._is_settled(step):
            if self.spent_s >= self._budget_s:
                self.stop()
            return
        self._slice.add(step)
        if self._slice.is_whole:
            self._slices.append(self._slice)
            self._slice = _Sum()
        seconds = sum(s.seconds for s in self._slices)
        is_long = bool(self._slices) and seconds >= _LONGEST_VISIT_S
        if (len(self._slices) >= _VISIT_SLICES and seconds >= _VISIT_S) or is_long:
            self._end_visit()
        elif self.spent_s >= self._budget_s:
            self.stop()

    def stop(self) -> None:
        """End it with what is known."""
        self.is_over = True

    def found(self) -> Found:
        """Once it is over."""
        tried = sorted(self._measured)
        speeds = {width: self._cost(tried[-1]) / self._cost(width) for width in tried}
        twice = [width for width, of in self._measured.items() if of.num_visits > 1]
        sure = [width for width in twice if self._is_better(width, MARGIN)]
        better = sure or [w for w in self._measured if self._is_better(w, LARGE_MARGIN)]
        return Found(
            width=min(better, key=self._cost) if better else self._most,
            speeds=speeds,
            seconds=self.spent_s,
            is_decided=self._is_decided or bool(sure),
            has_widest=self._top in self._measured,
            has_room=self._top == self._most,
        )

    # A visit: a width is settled, then measured.

    def _begin_visit(self) -> None:
        self._slice, self._slices = _Sum(), []
        self._is_reached = self._is_stuck = False
        self._num_settled = self._num_stuck = 0
        self._num_running = None

    def _is_settled(self, step: Stepped) -> bool:
        running, before = step.num_running, self._num_running
        self._num_running = running
        if not self._is_reached:
            is_below = running <= self.width
            if is_below and running >= _REACHED * self.width:
                self._is_reached = True
            elif is_below and before is not None and running <= before:
                self._num_stuck += 1
                self._is_stuck = self._num_stuck >= _NUM_STEPS_STUCK
                if self._is_stuck and step.num_given <= running:  # no rows
                    self.stop()
                self._is_reached = self._is_stuck
            return False
        self._num_settled += 1
        return self._num_settled > _NUM_STEPS_TO_SETTLE and not self.is_over

    def _end_visit(self) -> None:
        measured = self._measured.setdefault(self.width, _Measured())
        measured.slices += self._slices
        measured.num_visits += 1
        self.num_visits += 1
        if self._is_stuck:  # wider is the same: the engine has no room for more
            self._ladder = []
            self._top = self.width
        width = self._next()
        if width is None or self.spent_s >= self._budget_s:
            self._is_decided = width is None
            self.stop()
            return
        self.width = width
        self._begin_visit()

    # What is tried next.

    def _next(self) -> int | None:
        """None: it is decided."""
        if self._ladder:
            return self._ladder.pop(0)
        best = min(self._measured, key=self._cost)
        if best == self._top or self._cost(self._top) <= (1 + MARGIN) * self._cost(best):
            return None
        if self._measured[best].num_visits < 2 and best != self.width:
            return best
        if (between := self._between(best)) is not None:
            return between
        visits = {width: self._measured[width].num_visits for width in (self._top, best)}
        width = min(visits, key=visits.__getitem__)
        return width if visits[width] < _NUM_VISITS else None

    def _between(self, best: int) -> int | None:
        """What was not tried yet beside the best; above first, which takes no time to reach."""
        tried = sorted(self._measured)
        index = tried.index(best)
        for low, high in [*pairwise(tried[index : index + 2]), *pairwise(tried[: index + 1][-2:])]:
            middle = on_grid(math.sqrt(low * high))
            if high / low > _LEAST_RATIO and low < middle < high:
                return middle
        return None

    # What a width costs.

    def _cost(self, width: int) -> float:
        """Seconds for a generated token, or as much work on prompts."""
        return float(np.median(self._costs(width)))

    def _costs(self, width: int) -> list[float]:
        of_prompt = self._prompt_cost()
        slices = self._measured[width].slices
        return [s.seconds / max(1.0, s.generated + of_prompt * s.prompt) for s in slices]

    def _is_better(self, width: int, margin: float) -> bool:
        """Than the widest, by more than the margin and by more than chance."""
        if self._top not in self._measured:
            return False
        costs, others = self._costs(width), self._costs(self._top)
        if min(len(costs), len(others)) < 2:
            return False
        saved = float(np.median(others) - np.median(costs))
        chance = 2 * math.hypot(_error(costs), _error(others))
        return saved > max(margin * float(np.median(costs)), chance)

    def _prompt_cost(self) -> float:
        """What a token of a prompt takes beside a generated one: 0 to 1.

        By least squares of what steps took, over a constant, generated tokens and prompts'; each
        relative to what it took, so that one that was held up weighs no more than others.
        """
        groups = [g for g in self._groups if g.seconds > 0 and g.generated]
        if not any(g.prompt for g in groups) or len(groups) < 4:
            return _USUAL_PROMPT_COST
        work = np.array([[g.num_steps, g.generated, g.prompt] for g in groups], dtype=float)
        scale = work.mean(axis=0)
        seconds = np.array([g.seconds for g in groups])
        share, *_ = np.linalg.lstsq(work / scale / seconds[:, None], np.ones(len(groups)))
        of_step, of_generated, of_prompt = share
        own = of_step + of_generated
        if own <= 0 or not scale[2]:
            return _USUAL_PROMPT_COST
        return float(np.clip(of_prompt / scale[2] / (own / scale[1]), 0.0, 1.0))


def _error(values: list[float]) -> float:
    """Standard error of the median, by the middle of the deviations."""
    deviation = float(np.median(np.abs(np.array(values) - np.median(values))))
    return 1.86 * deviation / math.sqrt(len(values))
