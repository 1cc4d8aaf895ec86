"""The table on terminals and pages: every figure, every error, and nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from batchinfer.evaluation.comparison.axes import picture_of
from batchinfer.evaluation.comparison.columns import notes_of
from batchinfer.evaluation.comparison.outputs import schema, write_page, write_plot, write_results
from batchinfer.evaluation.comparison.page import page_of
from batchinfer.evaluation.comparison.table import table_lines
from batchinfer.evaluation.record import Record
from tests.evaluation.comparison.made_up import failed, many, record


def test_a_table_has_a_line_for_each_entry() -> None:
    lines = table_lines([record("demo fp32", perplexity=6.25), failed("demo qtip")])
    assert lines[0].split()[:2] == ["entry", "perplexity"]
    assert lines[1].startswith("demo fp32") and "6.2500" in lines[1]
    assert lines[2] == "demo qtip  failed: it broke"


def test_a_figure_beyond_measure_does_not_widen_the_table() -> None:
    lines = table_lines([record("a", perplexity=1.5e300, perplexity_high=2e301)])
    assert "1.500e+300" in lines[1] and "to 2.000e+301" in lines[1]
    assert len(lines[1]) < 150


def test_a_column_that_nobody_has_is_left_out() -> None:
    assert "KL" not in table_lines([record()])[0]
    assert "KL" in table_lines([record(), record("c", kl=0.01)])[0]


def test_a_divergence_is_shown_with_its_reference_and_method(
    tmp_path: Path,
) -> None:
    records = [record("base"), record("a", kl=0.01, kl_top_k=32, reference="base")]
    records.append(record("b", kl=0.02, kl_top_k=32, reference="base"))
    said = "divergence from base, k = 32"
    assert notes_of(records) == [f"KL: {said}, nats per token"]
    assert said in page_of(records, [], "t")
    assert "(from base, k = 32)" in picture_of(records, "bits", "kl").y_title
    records[-1] = record("b", kl=0.02, kl_top_k=8, reference="other")
    assert "other, k = 8" in table_lines(records)[-1]
    assert notes_of(records) == []
    assert "each entry's reference" in picture_of(records, "bits", "kl").y_title


def test_a_plot_is_never_wider_than_the_page() -> None:
    """On a narrow screen half of it would be behind a scroll bar."""
    (style,) = re.findall(r"figure img \{([^}]*)\}", page_of([record()], [], "t"))
    assert "width: 100%" in style and "min-width" not in style


def test_settings_are_shown_once_if_all_have_them_and_else_of_each() -> None:
    records = [record("a", settings="x=1"), record("b", settings="x=1"), failed("c")]
    assert notes_of(records) == ["settings: x=1"]
    assert "x=1" not in "".join(table_lines(records))
    records[1] = record("b")
    assert notes_of(records) == []
    assert "x=1" in table_lines(records)[1]


def test_a_label_of_any_kind_leaves_the_columns_below_one_another() -> None:
    """A very long one is shown without its middle; some characters take two cells, or none."""
    labels = ("a", "漢字 😀", "e\u0301te\u0301", f"start {'x' * 3000} end")
    lines = table_lines([record(label, perplexity=6.25) for label in labels])
    lines += table_lines([failed("漢字"), record("a b c d")])[1:2]
    starts = {cell_len(line[: line.index("6.2500")]) for line in lines[1:-1]}
    assert len(starts) == 1 and max(map(len, lines)) < 200
    assert lines[4].startswith("start xxx") and "xxx end " in lines[4]
    assert lines[-1].startswith("漢字     failed: ")


def test_only_failures_are_a_table_too() -> None:
    lines = table_lines([failed("demo", error="first line\nsecond line")])
    assert lines == ["entry", "demo   failed: first line"]
    assert "second line" in page_of([failed("demo", error="first line\nsecond line")], [], "t")


class Loads(HTMLParser):
    """What a page would load, and whether its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.loaded += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_a_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    html = write_page([*many(1), failed()], tmp_path, "Formats").read_text()
    page = Loads()
    page.feed(html)
    assert not page.open
    assert len(page.loaded) == 12  # six pictures, light and dark
    assert all(target.startswith("data:image/svg+xml;base64,") for target in page.loaded)
    assert "url(" not in html and "@import" not in html


def test_text_of_a_label_is_not_html() -> None:
    html = page_of([record("<b>x</b>"), failed("y", error="<i>z</i>")], [], "a & b")
    assert "<b>x" not in html and "<i>z" not in html
    assert "&lt;b&gt;x" in html and "<title>a &amp; b</title>" in html


def test_a_page_says_what_was_measured_where_all_agree() -> None:
    html = page_of([record("a"), record("b", context=256)], [], "t")
    facts = re.search(r'class="facts">(.*)</p>', html)
    assert facts is not None
    assert facts[1] == "wikitext2, 20 windows, 5,375 tokens, stride 256"


def test_results_are_the_records(tmp_path: Path) -> None:
    records = [record("a", kl=0.5), failed("b")]
    write_results(records, tmp_path, "t")
    content = json.loads((tmp_path / "results.json").read_text())
    assert [Record.model_validate(row) for row in content["records"]] == records
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.schema.equals(schema())
    assert [Record.model_validate(row) for row in table.to_pylist()] == records


def test_results_have_the_same_columns_if_nothing_was_measured(tmp_path: Path) -> None:
    write_results([failed()], tmp_path, "t")
    assert pq.read_schema(tmp_path / "results.parquet").equals(schema())


@pytest.mark.slow
def test_a_plot_is_written_as_svg_and_png(tmp_path: Path) -> None:
    paths = write_plot(many(2), tmp_path, "bits", "kl", title=None, is_dark=True)
    assert [path.name for path in paths] == ["kl-bits-dark.svg", "kl-bits-dark.png"]
    assert all(path.stat().st_size > 5_000 for path in paths)
