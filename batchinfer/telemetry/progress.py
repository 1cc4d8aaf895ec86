"""How far the run is, for whoever watches stderr: a live line, a log line now and then, or nothing.

`choose_display` decides once; a daemon thread of its own asks for snapshots, so the engine's thread
does nothing for it. Must not know: what is counted, or by whom.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, Self, TextIO

from batchinfer.telemetry.counters import Snapshot
from batchinfer.telemetry.logs import log_event
from batchinfer.telemetry.sums import ReplicaLine

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement

Display = Literal["live", "plain", "none"]

LIVE_PERIOD_S = 0.25
PLAIN_PERIOD_S = 30.0
#: While rows are in flight and no rate has been shown yet.
_FIRST_PERIOD_S = 5.0
_PHASE_POLL_S = 1.0
_CLOSE_WAIT_S = 2.0
#: With it, all facts of most runs still fit into 100 columns.
_BAR_WIDTH = 12
_GAP = "  "


def choose_display(
    err: TextIO, environ: Mapping[str, str], *, quiet: bool, json_lines: bool
) -> Display:
    """Live only where a person looks: a capable terminal, no CI, no JSON lines between the redraws.

    FORCE_COLOR and the like are not asked: CI systems set them, and rich would animate their pipes.
    """
    if quiet:
        return "none"
    is_live = err.isatty() and environ.get("TERM", "dumb") != "dumb" and not environ.get("CI")
    return "live" if is_live and not json_lines else "plain"


class Progress:
    """Context manager that shows `snapshot()` until it is left.

    While a live line stands, `terminal` (the log handler on the same stream) prints above it.
    """

    def __init__(
        self,
        display: Display,
        snapshot: Callable[[], Snapshot],
        logger: logging.Logger,
        terminal: logging.StreamHandler[TextIO],
        *,
        plain_period_s: float = PLAIN_PERIOD_S,
    ) -> None:
        self._snapshot = snapshot
        self._logger = logger
        self._terminal = terminal
        self._plain_period_s = plain_period_s
        self._is_closed = threading.Event()
        shows = {"live": self._show_live, "plain": self._show_plain}
        show = shows.get(display)
        self._thread = threading.Thread(target=show, name="progress", daemon=True) if show else None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the live line away. Idempotent; waits a moment at most."""
        self._is_closed.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(_CLOSE_WAIT_S)

    def _show_plain(self) -> None:
        phase, silent_s, wanted_s = "", 0.0, 0.0
        period_s = min(_PHASE_POLL_S, self._plain_period_s)
        while not self._is_closed.wait(period_s):
            silent_s += period_s
            snapshot = self._snapshot()
            if snapshot.phase != phase or silent_s >= wanted_s:
                phase, silent_s, wanted_s = snapshot.phase, 0.0, self._plain_period_s
                if snapshot.num_in_flight and not snapshot.tokens_per_s:
                    wanted_s = min(_FIRST_PERIOD_S, wanted_s)
                log_event(self._logger, logging.INFO, "progress", **_fields(snapshot))

    def _show_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        err = self._terminal.stream
        console = Console(file=err, force_terminal=True)
        live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with live:
            self._terminal.setStream(_AboveLive(console))  # type: ignore[arg-type]
            try:
                while True:
                    live.update(live_lines(self._snapshot()), refresh=True)
                    if self._is_closed.wait(LIVE_PERIOD_S):
                        return
            finally:
                self._terminal.setStream(err)


class _AboveLive:
    """What a log handler needs of a stream: writes whole lines above the live one."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        self._console.print(
            text.removesuffix("\n"), markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    def flush(self) -> None:
        """Each line is printed immediately."""


def live_lines(snapshot: Snapshot) -> RenderableType:
    """The whole run; below it each replica, if there are several."""
    from rich.console import Group
    from rich.padding import Padding

    if not snapshot.replicas:
        return live_line(snapshot)
    replicas = (Padding(_Fitting(_facts_of(line)), (0, 0, 0, 2)) for line in snapshot.replicas)
    return Group(live_line(snapshot), *replicas)


def live_line(snapshot: Snapshot) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    cells: list[RenderableType] = [snapshot.phase]
    line.add_column(no_wrap=True)
    if snapshot.rows_total:
        done = min(snapshot.rows_done, snapshot.rows_total)
        cells.append(ProgressBar(total=snapshot.rows_total, completed=done, width=_BAR_WIDTH))
        line.add_column(no_wrap=True)
    cells.append(_Fitting(_facts(snapshot)))
    line.add_column()  # of the columns only this one may shrink
    line.add_row(*cells)
    return line


class _Fitting:
    """The facts for which there is room, each whole; the first one is cut if it has to be."""

    def __init__(self, facts: Sequence[str]) -> None:
        self._facts = facts

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(1, max(1, len(_GAP.join(self._facts)))).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        text = self._facts[0] if self._facts else ""
        for fact in self._facts[1:]:
            if len(longer := f"{text}{_GAP}{fact}") <= options.max_width:
                text = longer
        yield Text(text, no_wrap=True, overflow="ellipsis")


def _facts(snapshot: Snapshot) -> list[str]:
    """What is known and not zero, most important first: a narrow terminal has no room for all."""
    facts = []
    if snapshot.rows_total:
        share = min(1.0, snapshot.rows_done / snapshot.rows_total)
        facts.append(f"{snapshot.rows_done:,}/{snapshot.rows_total:,} rows ({share:.0%})")
    elif snapshot.rows_done:
        facts.append(f"{snapshot.rows_done:,} rows")
    if snapshot.rows_failed:
        facts.append(f"{snapshot.rows_failed:,} failed")
    if snapshot.tokens_per_s:
        facts.append(f"{snapshot.tokens_per_s:,.0f} tokens/s")
    if snapshot.eta_s is not None and snapshot.rows_done != snapshot.rows_total:
        facts.append(f"ETA about {timedelta(seconds=round(snapshot.eta_s))}")
    if snapshot.num_in_flight:
        facts.append(f"{snapshot.num_in_flight:,} in flight")
    if num_waiting := snapshot.rows_computed - snapshot.rows_durable:
        facts.append(f"{num_waiting:,} not yet durable")
    return facts


def _facts_of(line: ReplicaLine) -> list[str]:
    """As `_facts`, of one replica."""
    facts = [f"{line.label}: {line.phase}"]
    if line.rows_computed:
        facts.append(f"{line.rows_computed:,} rows")
    if line.tokens_per_s:
        facts.append(f"{line.tokens_per_s:,.0f} tokens/s")
    if line.num_in_flight:
        facts.append(f"{line.num_in_flight:,} in flight")
    if line.num_restarts:
        facts.append(f"started {line.num_restarts + 1} times")
    return facts


def _fields(snapshot: Snapshot) -> dict[str, object]:
    fields: dict[str, object] = {
        "phase": snapshot.phase,
        "rows_done": snapshot.rows_done,
        "rows_total": snapshot.rows_total,
        "rows_failed": snapshot.rows_failed,
        "tokens_per_s": round(snapshot.tokens_per_s, 1) if snapshot.num_steps else None,
        "eta_s": None if snapshot.eta_s is None else round(snapshot.eta_s),
        "rows_in_flight": snapshot.num_in_flight or None,
        "rows_finished": snapshot.rows_computed or None,
        "replicas": {line.label: asdict(line) for line in snapshot.replicas} or None,
    }
    return {name: value for name, value in fields.items() if value is not None}
