"""The files of a comparison: results.json, results.parquet, comparison.html, plots.

Must not know: how anything was measured. Each file is there as a whole, in its new or old state.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer import __version__
from batchinfer.evaluation.comparison.axes import page_pictures, picture_of
from batchinfer.evaluation.comparison.cache import write_whole
from batchinfer.evaluation.comparison.page import PagePicture, page_of
from batchinfer.evaluation.comparison.plot import DARK, LIGHT, Format, draw, is_available
from batchinfer.evaluation.record import Record

PAGE = "comparison.html"
_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_FORMATS: tuple[Format, ...] = get_args(Format)


def write_results(records: Sequence[Record], out: Path, title: str) -> None:
    """results.json and results.parquet: every figure, a row for each record, also failed ones."""
    rows = [record.model_dump(mode="json") for record in records]
    content = {"title": title, "batchinfer_version": __version__, "records": rows}
    write_whole(out / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), sink)
    write_whole(out / "results.parquet", sink.getvalue())


def schema() -> pa.Schema:
    """The schema of results.parquet, whatever is null in it."""
    return pa.schema(
        [(name, _arrow_type(field.annotation)) for name, field in Record.model_fields.items()]
    )


def write_page(records: Sequence[Record], out: Path, title: str) -> Path:
    """The page, with pictures where matplotlib is installed."""
    pictures = []
    for x, y in page_pictures(records) if is_available() else []:
        picture = picture_of(records, x, y)
        caption = f"{picture.y_title}, against {picture.x_title}".replace("\n", " ")
        light, dark = (draw(picture, theme, "svg") for theme in (LIGHT, DARK))
        pictures.append(PagePicture(caption, light, dark))
    path = out / PAGE
    write_whole(path, page_of(records, pictures, title).encode())
    return path


def write_plot(
    records: Sequence[Record], out: Path, x: str, y: str, *, title: str | None, is_dark: bool
) -> list[Path]:
    """The plot as SVG and PNG. Raises ConfigError without matplotlib, or without data."""
    picture = picture_of(records, x, y)
    paths = []
    for file_format in _FORMATS:
        path = out / f"{y}-{x}{'-dark' if is_dark else ''}.{file_format}"
        write_whole(path, draw(picture, DARK if is_dark else LIGHT, file_format, title))
        paths.append(path)
    return paths


def _arrow_type(annotation: object) -> pa.DataType:
    """The Arrow type for `str`, `int | None` and the like."""
    kinds = get_args(annotation) or (annotation,)
    return next(_TYPES[kind] for kind in kinds if kind in _TYPES)
