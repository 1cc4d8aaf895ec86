"""`compare`: a spec's models and formats side by side, as a table, files and plots.

Must not know: how anything is measured or drawn.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from batchinfer.errors import ConfigError, TooManyFailedRows, TransientError
from batchinfer.evaluation.comparison.axes import NothingToPlot
from batchinfer.evaluation.comparison.cache import Cache
from batchinfer.evaluation.comparison.checks import check_inputs, check_plot
from batchinfer.evaluation.comparison.columns import figure_text, notes_of
from batchinfer.evaluation.comparison.names import check_name, printable
from batchinfer.evaluation.comparison.outputs import write_page, write_plot, write_results
from batchinfer.evaluation.comparison.plot import is_available
from batchinfer.evaluation.comparison.run import choose, compare, needed
from batchinfer.evaluation.comparison.spec import read_spec, requests_of
from batchinfer.evaluation.comparison.table import table_lines
from batchinfer.evaluation.folders import check_out, local_folder
from batchinfer.evaluation.record import Record


@dataclass(frozen=True, slots=True)
class PlotOptions:
    """What --plot draws."""

    x: str
    y: str
    is_dark: bool


def compare_spec(
    spec_path: str,
    out: str | None,
    patterns: Sequence[str],
    *,
    title: str | None,
    plot: PlotOptions | None,
    is_cleared: bool,
) -> None:
    """Raises ConfigError for a spec or options that cannot be, before anything is computed.

    TransientError, TooManyFailedRows if entries failed: everything else is measured and written.
    """
    spec = read_spec(spec_path)
    if title is not None:
        _check_title(title)
    all_planned = requests_of(spec)
    shown = choose(all_planned, patterns)
    planned = needed(all_planned, shown)
    check_inputs(planned, spec_path)
    if plot is not None:
        if not is_available():
            raise ConfigError("--plot needs matplotlib: pip install 'batchinfer[plot]'")
        check_plot(shown, plot.x, plot.y)
    folder = _folder(out, spec_path)
    check_out(folder)
    report = _Report()
    try:
        done = compare(planned, shown, Cache(folder), report, is_cleared=is_cleared)
    except KeyboardInterrupt:
        report.warns(f"stopped: finished windows are kept in {folder}; start again to continue")
        raise
    for line in (*table_lines(done.records), *notes_of(done.records)):
        click.echo(line)
    if len(shown) < len(all_planned):
        folder /= _filtered_name(patterns)
    heading = title or spec.title or printable(Path(spec_path).stem)
    files = _write_results(done.records, folder, heading)
    if plot is not None:
        files += _write_plot(done.records, folder, plot, title or spec.title, report)
    click.echo(f"written: {', '.join(map(str, files))}", err=True)
    if done.exit_code == TransientError.exit_code:
        raise TransientError(done.message)
    if done.exit_code:
        raise TooManyFailedRows(done.message)


def _write_results(records: Sequence[Record], folder: Path, heading: str) -> list[Path]:
    write_results(records, folder, heading)
    return [folder / "results.parquet", write_page(records, folder, heading)]


def _write_plot(
    records: Sequence[Record],
    folder: Path,
    plot: PlotOptions,
    title: str | None,
    report: _Report,
) -> list[Path]:
    """A plot that cannot be drawn is not a failure: only entries decide the exit code."""
    try:
        return write_plot(records, folder, plot.x, plot.y, title=title, is_dark=plot.is_dark)
    except NothingToPlot as error:
        report.warns(f"no plot was written: {error}")
        return []


def _check_title(title: str) -> None:
    try:
        check_name(title)
    except ValueError as error:
        raise ConfigError(f"--title {error}") from None


def _folder(out: str | None, spec_path: str) -> Path:
    if out:
        return local_folder("--out", out)
    return Path("out", "compare", Path(spec_path).stem)


def _filtered_name(patterns: Sequence[str]) -> str:
    """The folder for the results of some entries: those of all stay as they are."""
    digest = hashlib.sha256("\n".join(sorted(patterns)).encode()).hexdigest()[:6]
    words = "-".join(re.findall(r"[A-Za-z0-9.]+", " ".join(patterns)))[:40]
    return f"filtered-{words}-{digest}".replace("--", "-")


class _Report:
    """A line on stderr for what begins and what ends."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()

    def begins(self, label: str, log: Path) -> None:
        self._begun_s = time.monotonic()
        click.echo(f"{label}: running, log in {log}", err=True)

    def ends(self, record: Record, *, is_cached: bool) -> None:
        if record.error is not None:
            click.secho(f"{record.label}: failed: {record.error}", err=True, fg="red")
            return
        took = "kept from before" if is_cached else f"{time.monotonic() - self._begun_s:.0f} s"
        click.echo(
            f"{record.label}: perplexity {figure_text(record.perplexity, 4)} ({took})", err=True
        )

    def warns(self, message: str) -> None:
        click.secho(f"warning: {message}", err=True, fg="yellow")
