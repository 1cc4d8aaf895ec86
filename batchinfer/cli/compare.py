"""The command `compare` and its options.

Must not know: how anything is done. Importing it stays cheap, as of every command.
"""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from batchinfer.cli.options import TextCommand


@click.command(cls=TextCommand, short_help="Compare many models and formats: quality, size, speed.")
@click.argument("spec", type=click.Path(dir_okay=False))
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    help="Folder for the results and what a later start reuses; default: out/compare/SPEC.",
)
@click.option(
    "--filter",
    "patterns",
    multiple=True,
    metavar="GLOB",
    help="Only entries whose label matches, such as '*int*'. Repeatable.",
)
@click.option("--clear-cache", "is_cleared", is_flag=True, help="Compute finished entries again.")
@click.option("-p", "--plot", "has_plot", is_flag=True, help="Also write a plot, as SVG and PNG.")
@click.option("-t", "--title", metavar="TEXT", help="Title of the page and the plot.")
@click.option(
    "-x",
    "x",
    type=click.Choice(["bits", "memory", "peak", "speed"]),
    default="bits",
    show_default=True,
    help="Horizontal axis: bits per weight, size of the weights, peak memory, tokens/s.",
)
@click.option("-v", "--vram", "is_vram", is_flag=True, help="The same as -x memory.")
@click.option(
    "-y",
    "y",
    type=click.Choice(["perplexity", "bits-per-byte", "kl"]),
    default="perplexity",
    show_default=True,
    help="Vertical axis.",
)
@click.option("--dark", "is_dark", is_flag=True, help="Draw the plot for a dark background.")
def compare(
    spec: str,
    out: str | None,
    patterns: tuple[str, ...],
    is_cleared: bool,
    has_plot: bool,
    title: str | None,
    **plot: Any,
) -> None:
    """Measure every entry of SPEC (YAML or JSON), each in a process of its own.

    Prints a table and writes results.json, results.parquet and comparison.html. After an
    interruption run the same command again: finished windows are not computed twice.
    """
    from batchinfer.cli.comparison import PlotOptions, compare_spec

    plot["x"] = _x_axis(plot["x"], is_short=plot.pop("is_vram"))
    compare_spec(
        spec,
        out,
        patterns,
        title=title,
        plot=PlotOptions(**plot) if has_plot else None,
        is_cleared=is_cleared,
    )


def _x_axis(x: str, *, is_short: bool) -> str:
    """What -x and -v say. Raises UsageError if they say two things."""
    if not is_short:
        return x
    source = click.get_current_context().get_parameter_source("x")
    if source is not ParameterSource.DEFAULT and x != "memory":
        raise click.UsageError(f"-v is short for -x memory: give it or -x {x}, not both")
    return "memory"
