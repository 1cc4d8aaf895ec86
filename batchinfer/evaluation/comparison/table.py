"""A comparison's table as lines of text.

Must not know: terminals.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchinfer.evaluation.comparison.columns import Column, columns_of
from batchinfer.evaluation.record import Record


def table_lines(records: Sequence[Record]) -> list[str]:
    """A line for the titles and one for each record; of one that failed, the error's first line."""
    columns = columns_of(records)
    rows = [[column.text(record) for column in columns] for record in records]
    widths = [
        max(len(text) for text in (column.title, *(row[i] for row in rows)))
        for i, column in enumerate(columns)
    ]
    lines = [_line([column.title for column in columns], columns, widths)]
    for record, row in zip(records, rows, strict=True):
        if record.error is None:
            lines.append(_line(row, columns, widths))
        else:
            lines.append(f"{record.label:<{widths[0]}}  failed: {record.error.splitlines()[0]}")
    return lines


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = [
        f"{cell:>{width}}" if column.is_number else f"{cell:<{width}}"
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()
