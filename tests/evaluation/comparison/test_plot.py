"""Plots: what is on an axis, the same bytes each time, colours that can be told apart."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from batchinfer.errors import ConfigError
from batchinfer.evaluation.comparison.axes import page_pictures, picture_of
from batchinfer.evaluation.comparison.plot import DARK, LIGHT, Format, Theme, draw
from batchinfer.evaluation.record import Record
from tests.evaluation.comparison.made_up import failed, many, record

THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def test_a_point_has_no_need_of_its_familys_name() -> None:
    """The legend has it, and labels are short."""
    picture = picture_of(
        [record("demo int4", "demo"), record("other", "demo")], "bits", "perplexity"
    )
    assert [point.label for point in picture.points] == ["int4", "other"]


def test_sizes_have_the_unit_that_fits() -> None:
    small = picture_of([record(model_bytes=14_000_000)], "memory", "perplexity")
    assert (small.x_title, small.points[0].x) == ("model size, MB", 14.0)
    large = picture_of([record(model_bytes=16_000_000_000)], "memory", "perplexity")
    assert (large.x_title, large.points[0].x) == ("model size, GB", 16.0)


def test_what_failed_or_is_unknown_is_not_a_point() -> None:
    """A family keeps its colour whatever is left out, so it stays in the picture's list."""
    records = [failed("x", "one"), record("y", "two", layer_bits_per_weight=None), record("z", "3")]
    picture = picture_of(records, "bits", "perplexity")
    assert [point.label for point in picture.points] == ["z"]
    assert picture.families == ("one", "two", "3")


def test_nothing_to_plot_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"no entry has both bits and kl.*reference"):
        picture_of([record()], "bits", "kl")


def test_a_page_shows_bits_per_byte_where_perplexities_do_not_compare() -> None:
    one = record("a", layer_bits_per_weight=4.0)
    other = record("b", perplexity=9.0, bits_per_byte=0.9, data_digest="of other tokens")
    assert ("bits", "bits-per-byte") in page_pictures([one, other])
    assert ("bits", "perplexity") not in page_pictures([one, other])
    assert ("bits", "perplexity") in page_pictures(many())


@pytest.mark.slow
@THEMES
@pytest.mark.parametrize("file_format", ["svg", "png"])
def test_the_same_records_give_the_same_bytes(theme: Theme, file_format: Format) -> None:
    picture = picture_of(many(2), "bits", "perplexity")
    first = draw(picture, theme, file_format, "A title")
    assert first == draw(picture, theme, file_format, "A title")
    assert first.startswith(b"<?xml" if file_format == "svg" else b"\x89PNG")


@pytest.mark.slow
def test_a_picture_names_neither_a_date_nor_a_network() -> None:
    svg = draw(picture_of(many(2), "speed", "kl"), LIGHT, "svg").decode()
    assert "dc:date" not in svg
    loaded = re.findall(r'(?:href|src)="([^"]*)"', svg)
    assert all(target.startswith("#") for target in loaded)


@pytest.mark.slow
def test_a_single_point_and_values_far_apart_can_be_drawn() -> None:
    assert draw(picture_of([record()], "bits", "perplexity"), LIGHT, "svg")
    far = [record("a", perplexity=6.0), record("b", perplexity=60_000.0)]
    assert draw(picture_of(far, "bits", "perplexity"), LIGHT, "svg")


@pytest.mark.slow
def test_drawing_leaves_the_programs_own_matplotlib_as_it_is() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw(picture_of(many(1), "bits", "perplexity"), DARK, "svg")
    assert dict(mpl.rcParams) == before


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is drawn as plain text, in the order of drawing."""
    from matplotlib.backends.backend_svg import RendererSVG

    drawn: list[str] = []
    draw_text = RendererSVG.draw_text

    def spy(self: Any, gc: Any, x: float, y: float, text: str, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("ismath", args[2] if len(args) > 2 else False):
            drawn.append(text)
        draw_text(self, gc, x, y, text, *args, **kwargs)

    monkeypatch.setattr(RendererSVG, "draw_text", spy)
    return drawn


@pytest.mark.slow
def test_names_are_drawn_as_they_are_written(texts: list[str]) -> None:
    """No formulas between dollars, and no family missing that begins with an underscore."""
    records = [
        record("price $\\frac{$", "cost $5 and $6"),
        record("_a", "_hidden", layer_bits_per_weight=4.0),
    ]
    draw(picture_of(records, "bits", "perplexity"), LIGHT, "svg", "of $\\frac{$ and $6")
    names = {"price $\\frac{$", "cost $5 and $6", "_a", "_hidden", "of $\\frac{$ and $6"}
    assert names <= set(texts)


@pytest.mark.slow
def test_a_name_that_is_too_long_loses_its_middle(texts: list[str]) -> None:
    long = f"start{'x' * 300}end"
    records = [record(long, "f"), record("b", long, layer_bits_per_weight=4.0)]
    draw(picture_of(records, "bits", "perplexity"), LIGHT, "svg", long)
    short = [text for text in texts if text.startswith("start") and text.endswith("end")]
    assert len(short) == 2 and all("…" in text and len(text) <= 70 for text in short)


@pytest.mark.slow
@pytest.mark.parametrize(
    "records",
    [
        [record("a", perplexity=1e300)],
        [record("a", perplexity=1e304), record("b", perplexity=1.0)],
        [record("漢", "字")],
    ],
)
def test_drawing_says_nothing(records: list[Record]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(picture_of(records, "bits", "perplexity"), LIGHT, "svg", "漢")


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@THEMES
def test_colours_stand_out_from_their_background(theme: Theme) -> None:
    """WCAG 2: 3 for graphical objects (1.4.11), 4.5 for text (1.4.3)."""
    assert min(contrast(colour, theme.background) for colour in theme.families) >= 3
    assert min(contrast(text, theme.background) for text in (theme.text, theme.muted)) >= 4.5


#: Full dichromacy in linear RGB: Machado, Oliveira and Fernandes 2009, table 1, severity 1.
SEEN_BY = {
    "everybody": np.eye(3),
    "protanopes": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopes": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopes": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colour: str, seen: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """CIELAB (D65) of a colour as somebody sees it."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(seen) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(to_xyz @ linear / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@THEMES
@pytest.mark.parametrize("who", SEEN_BY)
def test_families_can_be_distinguished(theme: Theme, who: str) -> None:
    """A distance of 20 in CIELAB is plain to see; markers differ as well."""
    seen = [lab(colour, SEEN_BY[who]) for colour in theme.families]
    apart = [float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)]
    assert min(apart) > 20


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path: Path) -> None:
    """Everything else of a comparison works without it."""
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from batchinfer.evaluation.comparison.plot import LIGHT, draw, is_available\n"
        "from batchinfer.evaluation.comparison.outputs import write_page, write_results\n"
        "from batchinfer.evaluation.comparison.axes import picture_of\n"
        "from batchinfer.errors import ConfigError\n"
        "from tests.evaluation.comparison.made_up import record\n"
        "from pathlib import Path\n"
        "assert not is_available()\n"
        f"write_page([record()], Path({str(tmp_path)!r}), 't')\n"
        "try:\n    draw(picture_of([record()], 'bits', 'perplexity'), LIGHT, 'svg')\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "pip install 'batchinfer[plot]'" in done.stdout
    assert "<table>" in (tmp_path / "comparison.html").read_text()
