"""What a plot may show: figures of a record, their titles and units.

Must not know: how anything is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchinfer.errors import ConfigError
from batchinfer.evaluation.comparison.columns import kl_text
from batchinfer.evaluation.record import Record


class NothingToPlot(ConfigError):
    """No entry has both figures."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A figure to plot. `title` has its unit."""

    name: str
    title: str
    value: Callable[[Record], float | None]


X_AXES = {
    axis.name: axis
    for axis in (
        Axis("bits", "bits per weight of the decoder layers", lambda r: r.layer_bits_per_weight),
        Axis("memory", "model size, {unit}", lambda r: r.model_bytes),
        Axis("peak", "peak device memory without KV cache, {unit}", lambda r: r.peak_memory_bytes),
        Axis("speed", "scored tokens per second", lambda r: r.tokens_per_s),
    )
}
Y_AXES = {
    axis.name: axis
    for axis in (
        Axis("perplexity", "perplexity", lambda r: r.perplexity),
        Axis("bits-per-byte", "bits per byte of text", lambda r: r.bits_per_byte),
        Axis("kl", "KL divergence, nats per token\n(from {reference})", lambda r: r.kl),
    )
}


@dataclass(frozen=True, slots=True)
class Point:
    """A record's place in a plot. `label`: without its family's name, which the legend has."""

    label: str
    family: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Picture:
    """What a plot shows, with units chosen. `families`: in the order of the records."""

    x_title: str
    y_title: str
    points: tuple[Point, ...]
    families: tuple[str, ...]


def picture_of(records: Sequence[Record], x: str, y: str) -> Picture:
    """The points of all records that have both figures. Raises NothingToPlot if none has."""
    x_axis, y_axis = X_AXES[x], Y_AXES[y]
    points = [
        Point(_short(record), record.family, float(at_x), float(at_y))
        for record in records
        if record.error is None
        and (at_x := x_axis.value(record)) is not None
        and (at_y := y_axis.value(record)) is not None
    ]
    if not points:
        raise NothingToPlot(
            f"nothing to plot: no entry has both {x} and {y}"
            + (". For kl the spec needs a reference" if y == "kl" else "")
        )
    scale, unit = _unit(points) if "{unit}" in x_axis.title else (1.0, "")
    # In the order of all records, so that a family keeps its colour whatever is left out.
    families = dict.fromkeys(record.family for record in records)
    return Picture(
        x_axis.title.format(unit=unit),
        y_axis.title.format(reference=kl_text(records) or "each entry's reference"),
        tuple(Point(p.label, p.family, p.x / scale, p.y) for p in points),
        tuple(families),
    )


def page_pictures(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(x, y) of the plots that a page shows: those with two points at least, at different places.

    Where the records are of different tokens, perplexities do not compare: bits per byte do.
    """
    digests = {record.data_digest for record in records} - {None}
    wanted = ("perplexity" if len(digests) < 2 else "bits-per-byte", "kl")
    return [(x, y) for y in wanted for x in ("bits", "memory", "speed") if _has_two(records, x, y)]


def _has_two(records: Sequence[Record], x: str, y: str) -> bool:
    try:
        points = picture_of(records, x, y).points
    except NothingToPlot:
        return False
    return len({(point.x, point.y) for point in points}) > 1


def _short(record: Record) -> str:
    return record.label.removeprefix(f"{record.family} ")


def _unit(points: Sequence[Point]) -> tuple[float, str]:
    """Decimal, as disks and downloads count."""
    largest = max(point.x for point in points)
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
