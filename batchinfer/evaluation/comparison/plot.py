"""A picture of a comparison, as SVG or PNG, light or dark. The only importer of matplotlib.

The same records give the same bytes with one version of matplotlib. Must not know: files, specs.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from batchinfer.errors import ConfigError
from batchinfer.evaluation.comparison.axes import Picture, Point
from batchinfer.evaluation.comparison.labels import Box, Label, Segment, leader_of, place_labels
from batchinfer.evaluation.comparison.names import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]

_SIZE_INCHES = (7.6, 4.75)
_DPI = 144
#: Above this ratio of the largest to the smallest value the y axis is logarithmic.
_LOG_RATIO = 10.0
_MARGIN_Y = 0.12
_FLOAT_RANGE = (-307.0, 308.0)  # powers of ten
_MAX_DECADES, _MAX_TICKS = 30, 8
_MARKERS = "osD^vPX<"
_MARKER_POINTS = 6.5
_LABEL_POINTS = 8.5
_TITLE_CHARS, _TITLE_LINES = 70, 4
#: Characters that are drawn of a name, those that fit into a line of the legend, and what the
#: sample of a line takes beside a name.
_LABEL_CHARS, _LEGEND_CHARS, _LINE_CHARS, _HANDLE_CHARS = 36, 70, 92, 6


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a background. `families`: told apart with all common kinds of colour blindness,
    each with a contrast of at least 3 to the background (WCAG 1.4.11); text has 4.5 and more.
    """

    background: str
    text: str
    muted: str
    grid: str
    families: tuple[str, ...]


#: Begun from the palette of Okabe and Ito (jfly.uni-koeln.de/color), each colour moved so that the
#: smallest distance of two in CIELAB, as anybody sees them, is largest; tests/ measure it.
LIGHT = Theme(
    background="#ffffff",
    text="#1a1d21",
    muted="#545b64",
    grid="#e3e6ea",
    families=("#2645d9", "#ea710b", "#00a870", "#c45bbc", "#5f4000", "#121a31"),
)
DARK = Theme(
    background="#15181c",
    text="#e8eaed",
    muted="#a9b0b8",
    grid="#2c3138",
    families=("#2fd7ff", "#ee7928", "#299863", "#ba6ea5", "#f6ed28", "#b8e4c1"),
)


def draw(picture: Picture, theme: Theme, file_format: Format, title: str | None = None) -> bytes:
    """The image's bytes. Raises ConfigError where matplotlib is not installed."""
    with _settings(theme), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box; table and page have the whole name.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _dress(axes, picture, theme)
        _draw_families(axes, picture, theme)
        _head(figure, picture, title)
        figure.draw_without_rendering()  # the layout decides where the axes are
        figure.set_layout_engine("none")
        _draw_labels(axes, picture, theme)
        sink = io.BytesIO()
        figure.savefig(sink, format=file_format, metadata=_no_date(file_format))
    return sink.getvalue()


def is_available() -> bool:
    """Whether pictures can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _settings(theme: Theme) -> AbstractContextManager[None]:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'batchinfer[plot]'. "
            "The table and results.parquet need none"
        ) from None
    return mpl.rc_context(
        {
            # Not a user's own style: the same records give the same picture everywhere.
            **mpl.rcParamsDefault,
            "backend": "agg",
            "svg.fonttype": "path",  # labels were placed with this font's widths
            "svg.hashsalt": "batchinfer",
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9.5,
            "figure.facecolor": theme.background,
            "axes.facecolor": theme.background,
            "axes.edgecolor": theme.muted,
            "axes.labelcolor": theme.text,
            "text.color": theme.text,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "grid.color": theme.grid,
        }
    )


def _no_date(file_format: Format) -> dict[str, Any]:
    return {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}


def _dress(axes: Axes, picture: Picture, theme: Theme) -> None:
    axes.set_xlabel(picture.x_title)
    axes.set_ylabel(picture.y_title)
    axes.grid(visible=True, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=_MARGIN_Y)  # room for labels beside and above the outermost points
    values = [point.y for point in picture.points]
    if min(values) > 0 and max(values) / min(values) > _LOG_RATIO:
        _make_logarithmic(axes, min(values), max(values))
    if max(point.x for point in picture.points) >= 10_000:
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _make_logarithmic(axes: Axes, low: float, high: float) -> None:
    """Over very many decades with margins and ticks of our own: matplotlib's leave the range of a
    float near its end.
    """
    axes.set_yscale("log")
    bottom, top = math.log10(low), math.log10(high)
    if top - bottom <= _MAX_DECADES:
        return
    margin = _MARGIN_Y * (top - bottom)
    bottom, top = max(bottom - margin, _FLOAT_RANGE[0]), min(top + margin, _FLOAT_RANGE[1])
    step = math.ceil((top - bottom) / _MAX_TICKS)
    axes.set_ylim(10**bottom, 10**top)
    axes.set_yticks([10.0**n for n in range(math.ceil(bottom), math.floor(top) + 1, step)])
    axes.minorticks_off()


def _draw_families(axes: Axes, picture: Picture, theme: Theme) -> None:
    for index, family in enumerate(picture.families):
        if not (points := _of(picture.points, family)):
            continue
        axes.plot(
            [point.x for point in points],
            [point.y for point in points],
            color=theme.families[index % len(theme.families)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=_MARKER_POINTS,
            markeredgecolor=theme.background,
            markeredgewidth=0.8,
            linewidth=1.4,
            # Beyond the palette a colour comes again, with another line and marker.
            linestyle=("-", "--", ":", "-.")[index // len(theme.families) % 4],
            clip_on=False,
        )


def _drawn(picture: Picture) -> list[str]:
    """The families that have a point, in the order in which they are drawn."""
    return [family for family in picture.families if _of(picture.points, family)]


def _of(points: Sequence[Point], family: str) -> list[Point]:
    """The points of a family, in the order in which they are joined."""
    return sorted((p for p in points if p.family == family), key=lambda p: (p.x, p.y, p.label))


def _head(figure: Figure, picture: Picture, title: str | None) -> None:
    """Title and legend, above the axes: inside, a legend would cover points or labels."""
    wrapped = textwrap.wrap(title or "", _TITLE_CHARS, max_lines=_TITLE_LINES, placeholder=" …")
    families = _drawn(picture)
    max_chars = _LEGEND_CHARS if len(families) <= 4 else _LEGEND_CHARS // 2
    longest = min(max(map(len, families)), max_chars)
    legend = figure.legend(
        figure.axes[0].get_lines(),
        # Written below: matplotlib leaves out a label that begins with an underscore.
        [str(number) for number in range(len(families))],
        loc="outside upper left",
        ncols=max(1, min(len(families), 4, _LINE_CHARS // (longest + _HANDLE_CHARS))),
        frameon=False,
        handlelength=1.8,
        title="\n".join(wrapped) or None,
        title_fontproperties={"size": 11.5, "weight": "bold"},
        alignment="left",
    )
    for family, text in zip(families, legend.get_texts(), strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(family, max_chars))
    legend.get_title().set_parse_math(False)


def _draw_labels(axes: Axes, picture: Picture, theme: Theme) -> None:
    labels = _measured(axes, picture)
    frame = _in_points(axes, axes.get_window_extent().extents)
    places = place_labels(
        labels, frame, lines=_lines(picture, labels), marker_radius=_MARKER_POINTS / 2 + 1
    )
    # Where a line passes below a label all the same, this keeps the letters apart from it.
    backing = {"boxstyle": "square,pad=0.05", "facecolor": theme.background, "linewidth": 0}
    for point, label, place in zip(picture.points, labels, places, strict=True):
        axes.annotate(
            shortened(point.label, _LABEL_CHARS),
            (place.box.left, place.box.bottom),
            xycoords="figure points",
            fontsize=_LABEL_POINTS,
            zorder=3,
            parse_math=False,
            bbox=backing,
        )
        if (leader := leader_of(label, place)) is not None:
            axes.annotate(
                "",
                leader[0],
                leader[1],
                xycoords="figure points",
                textcoords="figure points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": theme.muted,
                    "linewidth": 0.7,
                    "shrinkA": 0,
                    "shrinkB": _MARKER_POINTS / 2 + 1,
                },
            )


def _measured(axes: Axes, picture: Picture) -> list[Label]:
    """Where each point is drawn and how large its label will be, in points of the figure."""
    pixels = axes.transData.transform([(point.x, point.y) for point in picture.points])
    labels = []
    for point, (x, y) in zip(picture.points, pixels, strict=True):
        shown = shortened(point.label, _LABEL_CHARS)
        text = axes.text(0, 0, shown, fontsize=_LABEL_POINTS, parse_math=False)
        size = _in_points(axes, text.get_window_extent().extents)
        text.remove()
        at = _in_points(axes, (x, y, x, y))
        labels.append(Label(at.left, at.bottom, size.right - size.left, size.top - size.bottom))
    return labels


def _in_points(axes: Axes, pixels: Iterable[float]) -> Box:
    """As SVG and PNG differ in pixels."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = 72 / figure.dpi
    return Box(*(float(edge) * scale for edge in pixels))


def _lines(picture: Picture, labels: Sequence[Label]) -> list[Segment]:
    """The segments between the points of each family, where they are drawn."""
    at = {
        id(point): (label.x, label.y) for point, label in zip(picture.points, labels, strict=True)
    }
    return [
        (at[id(one)], at[id(other)])
        for family in picture.families
        for one, other in pairwise(_of(picture.points, family))
    ]
