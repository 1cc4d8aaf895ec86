"""A comparison's table as lines of text.

Must not know: terminals.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from batchinfer.evaluation.comparison.columns import Column, columns_of
from batchinfer.evaluation.comparison.names import shortened
from batchinfer.evaluation.record import Record

#: Characters of a label; the files have all of it.
_LABEL_CHARS = 60


def table_lines(records: Sequence[Record]) -> list[str]:
    """A line for the titles and one for each record; of one that failed, the error's first line."""
    columns = columns_of(records)
    rows = [
        [shortened(column.text(record), _LABEL_CHARS) for column in columns] for record in records
    ]
    widths = [
        max(cell_len(text) for text in (column.title, *(row[i] for row in rows)))
        for i, column in enumerate(columns)
    ]
    lines = [_line([column.title for column in columns], columns, widths)]
    for record, row in zip(records, rows, strict=True):
        if record.error is None:
            lines.append(_line(row, columns, widths))
        else:
            lines.append(f"{_padded(row[0], widths[0])}  failed: {record.error.splitlines()[0]}")
    return lines


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = [
        f"{cell:>{width}}" if column.is_number else _padded(cell, width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _padded(text: str, width: int) -> str:
    """To a number of cells of a terminal, of which some characters take two and some none."""
    return set_cell_size(text, width)
