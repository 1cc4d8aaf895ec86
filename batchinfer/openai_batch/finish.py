"""The results of a batch -> the file of answers and the file of errors, in the order of the lines.

Both appear once they are whole. Must not know: how results were computed. Memory:
some rows at a time.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.ledger import named_if_damaged
from batchinfer.openai_batch.answers import Answers, refusal_of
from batchinfer.storage import Store

_BATCH_ROWS = 512
#: Columns of results that say whether a line failed.
_OF_ERRORS = ["line", "custom_id", "error_type", "error_message"]


@dataclass(slots=True)
class Written:
    """How many lines have an answer, and why the others have none: code -> lines."""

    num_answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def num_errors(self) -> int:
        return self.errors.total()


def write_answers(
    requests: BinaryIO,
    results: BinaryIO,
    answers: Answers,
    store: Store,
    keys: tuple[str, str],
) -> Written:
    """`requests`, `results`: Parquet files. `keys` of the store: for the answers, and for errors;
    without an error that is not there afterwards.
    """
    written = Written()

    def error_lines() -> Iterator[bytes]:
        for line, rows in _lines(requests, results, _OF_ERRORS):
            if (refusal := refusal_of(rows)) is not None:
                written.errors[refusal.code] += 1
                yield _json(answers.refused(line, rows[0]["custom_id"], refusal))

    def answer_lines() -> Iterator[bytes]:
        for line, rows in _lines(requests, results):
            if refusal_of(rows) is None:
                written.num_answers += 1
                yield _json(answers.answered(line, rows))

    of_answers, of_errors = keys
    lines = error_lines()
    if (first := next(lines, None)) is None:
        store.delete([of_errors])
    else:
        store.publish(of_errors, lambda sink: sink.writelines(chain([first], lines)))
    store.publish(of_answers, lambda sink: sink.writelines(answer_lines()))
    return written


def _lines(
    requests: BinaryIO, results: BinaryIO, columns: list[str] | None = None
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each line's rows: of results, or the one that says why it was refused."""
    both = heapq.merge(_refused(requests), _results(results, columns), key=_line_of)
    for line, rows in groupby(both, key=_line_of):
        yield line, list(rows)


def _line_of(row: Mapping[str, Any]) -> int:
    return int(row["line"])


def _refused(requests: BinaryIO) -> Iterator[dict[str, Any]]:
    columns = ["line", "custom_id", "refusal"]
    for batch in _batches(requests, columns):
        yield from batch.filter(pc.is_valid(batch.column("refusal"))).to_pylist()


def _results(results: BinaryIO, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    for batch in _batches(results, columns):
        for row in batch.to_pylist():
            yield {**row, "refusal": None}


def _batches(file: BinaryIO, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    with named_if_damaged(file.name):
        yield from pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=columns)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
