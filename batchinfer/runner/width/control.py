"""How many sequences run at once: the widest, or what a search or an earlier run found best.

The loop asks how many requests the engine may have, and tells of its steps. Must not know: rows,
files. Used by the engine's thread; any may ask for the report. Invariants: the width is never above
the engine's max_num_seqs; whatever becomes of the search, rows go on at some width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from batchinfer.engine.base import Engine
from batchinfer.engine.narrowing import NarrowableEngine
from batchinfer.runner.width.memory import Remembered, WidthMemory
from batchinfer.runner.width.search import BUDGET_S, Found, Stepped, WidthSearch
from batchinfer.telemetry import Counters
from batchinfer.verdict import Setup

logger = logging.getLogger("batchinfer.runner")

#: A job with fewer rows than so many times the widest ends before a search could.
_LEAST_ROUNDS = 3
#: What an earlier run found is of other rows if these have twice as many tokens, or half.
_OTHER_LENGTH = 2.0
#: ... known once so many times the widest, at least so many, are answered: short ones come first.
_LENGTH_ROUNDS, _LEAST_LENGTHS = 4, 64
#: An engine that has computed nothing by then does not say what its steps compute.
_NUM_STEPS_UNCOUNTED = 8


@dataclass(frozen=True, slots=True)
class WidthReport:
    """`by`: how it came to the width. `gain`: over the widest, as measured; None: not measured.

    `speeds`: by width, beside the widest that was measured.
    """

    width: int
    widest: int  # the engine's max_num_seqs
    by: Literal["searching", "search", "memory", "skipped"]
    text: str
    gain: float | None = None
    seconds: float = 0.0  # that the search took
    speeds: tuple[tuple[int, float], ...] = ()
    is_remembered: bool = False  # for later runs

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "width": self.width,
            "max_num_seqs": self.widest,
            "by": self.by,
            "gain": None if self.gain is None else round(self.gain, 4),
            "search_s": round(self.seconds, 1),
            "relative_speeds": {str(width): round(speed, 3) for width, speed in self.speeds},
            "is_remembered": self.is_remembered,
            "text": f"engine.tune: {self.text}",
        }


def backlog_of(max_num_seqs: int) -> int:
    """Requests kept waiting in the engine beyond those it can run, so that no step runs short.

    A quarter, as measured on an H200 (1,280 in flight for 1,024 running equals one call with
    everything).
    """
    return max(16, max_num_seqs // 4)


class Width:
    """The widest, as long as nobody says otherwise."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.widest = self.now = engine.facts.max_num_seqs
        self._is_kept = True  # by the engine; else by having no more in it

    @property
    def max_in_flight(self) -> int:
        """Requests that the engine may have."""
        return self.now + (backlog_of(self.now) if self._is_kept else 0)

    @property
    def is_searching(self) -> bool:
        return False

    def stepped(self, step: Stepped) -> None:
        """The engine has run a step, with as many rows as it may have."""

    def answered(self, num_completion_tokens: int) -> None:
        """A request has its answer."""

    def _set(self, width: int) -> None:
        self.now = width
        engine = self._engine
        self._is_kept = (
            isinstance(engine, NarrowableEngine) and engine.set_width(width)
        ) or width == self.widest


class TunedWidth(Width):
    """Searched while the first rows run, or remembered. `tell` gets each report."""

    def __init__(
        self,
        engine: Engine,
        memory: WidthMemory,
        counters: Counters,
        tell: Callable[[WidthReport], None],
        *,
        budget_s: float = BUDGET_S,
    ) -> None:
        super().__init__(engine)
        self._memory = memory
        self._counters = counters
        self._tell = tell
        self._budget_s = budget_s
        self._search: WidthSearch | None = None
        self._remembered: Remembered | None = None  # until it is known whether it is of such rows
        self._num_visits = self._num_steps = 0
        self._num_answers = self._num_completion_tokens = 0
        self._has_tokens = False
        self._begin()

    @property
    def is_searching(self) -> bool:
        return self._search is not None

    def stepped(self, step: Stepped) -> None:
        search = self._search
        if search is None:
            return
        self._num_steps += 1
        self._has_tokens |= step.num_tokens > 0
        if not self._has_tokens and self._num_steps >= _NUM_STEPS_UNCOUNTED:
            self._skip("skipped: the engine runs in another process and does not tell its steps")
            return
        search.add(step)
        if search.num_visits > self._num_visits:
            self._num_visits = search.num_visits
            if not search.is_over and (left_s := self._too_short()) is not None:
                self._skip(f"skipped: the rows that are left take about {left_s:.0f} s, less than "
                           "a search")  # fmt: skip
                return
        if search.is_over:
            self._end(search.found())
        elif search.width != self.now:
            self._set(search.width)

    def answered(self, num_completion_tokens: int) -> None:
        self._num_answers += 1
        self._num_completion_tokens += num_completion_tokens
        if self._remembered is None:
            return
        if self._num_answers >= max(_LEAST_LENGTHS, _LENGTH_ROUNDS * self.widest):
            expected, mean = self._remembered.completion_tokens, self._mean_completion_tokens()
            self._remembered = None
            if not 1 / _OTHER_LENGTH <= (1 + mean) / (1 + expected) <= _OTHER_LENGTH:
                logger.info(
                    "engine.tune: rows have %.0f tokens, those of the earlier run had %.0f: the "
                    "width is searched again",
                    mean,
                    expected,
                )
                self._begin_search()

    def _mean_completion_tokens(self) -> float:
        return self._num_completion_tokens / max(1, self._num_answers)

    def _begin(self) -> None:
        if (remembered := self._memory.read()) is not None:
            self._set(remembered.width)
            self._remembered = remembered
            self._report(_of_memory(remembered, self.widest))
            return
        self._begin_search()

    def _begin_search(self) -> None:
        num_left = self._rows_left()
        if num_left is not None and num_left < _LEAST_ROUNDS * self.widest:
            self._skip(
                f"skipped: {num_left:,} rows are left, and a search takes at least "
                f"{_LEAST_ROUNDS} times the {self.widest:,} that run at once"
            )
            return
        graph_width = self._engine.facts.running.graph_width
        search = WidthSearch(self.widest, graph_width, budget_s=self._budget_s)
        if search.is_over:
            self._skip(f"skipped: max_num_seqs is {self.widest}, which leaves nothing to search")
            return
        self._search = search
        self._set(search.width)
        text = f"searching the width, up to {self.widest:,} sequences at once"
        self._report(WidthReport(self.now, self.widest, "searching", text))

    def _rows_left(self) -> int | None:
        now = self._counters.snapshot()
        if now.rows_total is None:
            return None
        return max(0, now.rows_total - now.rows_done_at_start - now.rows_computed)

    def _too_short(self) -> float | None:
        """How long the rest takes, if that is less than what is left of the search."""
        assert self._search is not None
        left_s = self._counters.snapshot().eta_s
        if left_s is None or left_s >= self._budget_s - self._search.spent_s:
            return None
        return left_s

    def _skip(self, text: str) -> None:
        seconds = self._search.spent_s if self._search is not None else 0.0
        self._search = None
        self._set(self.widest)
        text = f"{text}; {self.widest:,} sequences at once, as without it"
        self._report(WidthReport(self.now, self.widest, "skipped", text, seconds=seconds))

    def _end(self, found: Found) -> None:
        self._search = None
        self._set(found.width)
        report = WidthReport(
            width=found.width,
            widest=self.widest,
            by="search",
            text=_told(found, self.widest),
            gain=found.gain if found.has_widest else None,
            seconds=found.seconds,
            speeds=tuple(found.speeds.items()),
        )
        if found.is_decided:
            mean = self._mean_completion_tokens()
            is_kept = self._memory.write(Remembered(found.width, found.gain, mean))
            report = replace(report, is_remembered=is_kept)
            if is_kept:
                report = replace(report, text=f"{report.text}; remembered")
        self._report(report)

    def _report(self, report: WidthReport) -> None:
        logger.info("engine.tune: %s", report.text)
        self._tell(report)


def at_width(setup: Setup, report: WidthReport | None) -> Setup:
    """As the engine runs with what was found."""
    if report is None or report.by == "searching":
        return setup
    return replace(setup, width=report.width, is_narrowed=report.width < report.widest)


def widths_told(reports: Mapping[str, WidthReport]) -> dict[str, Any] | None:
    """For JSON, of the one engine, or of replicas by label. None: nothing is tuned."""
    if not reports:
        return None
    if (one := reports.get("")) is not None:
        return one.as_dict()
    texts = "; ".join(f"{label}: {report.text}" for label, report in reports.items())
    of_each = {label: report.as_dict() for label, report in reports.items()}
    return {"replicas": of_each, "text": f"engine.tune: {texts}"}


def _of_memory(found: Remembered, widest: int) -> WidthReport:
    what = f"{found.width:,} sequences at once, as an earlier run found"
    if found.width < widest:
        what += f" ({found.gain:.0%} faster than {widest:,})"
    return WidthReport(found.width, widest, "memory", what, found.gain, is_remembered=True)


def _told(found: Found, widest: int) -> str:
    begin = f"searched for {found.seconds:.0f} s: "
    speeds = ", ".join(f"{width:,}: {speed:.2f}" for width, speed in found.speeds.items())
    if not found.has_widest:
        shown = f"; measured up to {max(found.speeds):,}: {speeds}" if speeds else ""
        return begin + f"no time to measure {widest:,} sequences at once, which stay{shown}"
    measured = f" (tokens/s beside the widest: {speeds})"
    if found.width < widest:
        seen = "" if found.is_decided else ", seen once"
        return (
            begin
            + f"{found.width:,} sequences at once are {found.gain:.0%} faster than "
            + (f"{widest:,}{seen}{measured}")
        )
    if not found.is_decided:
        return begin + f"nothing sure is faster than {widest:,} sequences at once{measured}"
    room = "" if found.has_room else "; the engine has no room for so many"
    return begin + f"{widest:,} sequences at once stay, none is 3 % faster{measured}{room}"
