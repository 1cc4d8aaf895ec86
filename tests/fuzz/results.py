"""The results of an output beside the input they should be of, read without batchinfer's rooms."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import Job
from batchinfer.errors import ROW_ERROR_KINDS
from tests.fuzz import own, prompts
from tests.fuzz.server import Ended
from tests.fuzz.wrong import Broken
from tests.support.jobs import CHANGING_COLUMNS

#: The folder that shards are named below, by what the job file says.
_ROOTS = {"in": "in", "in/": "in", "in/*": "in", "in/*.parquet": "in", "in/?*.parquet": "in"}
_ROOTS |= {"in/**/*.parquet": "in", "./in": "in", "in/**": "in", "in/a.parquet": "in"}
_WHOLE = ("in", "in/", "in/**/*.parquet", "./in", "in/**")


_MAX_TOKENS = 2048
_OF_PROMPT = ("error_type", "num_prompt_tokens", "token_ids")


@dataclass(frozen=True, slots=True)
class RowCounts:
    rows: int
    failed: int


def check_output(folder: Path, job: Job, output: Path, ran: Ended) -> RowCounts:
    """Raises Broken unless each row has its results, and nothing else is there."""
    finished = {str(path.relative_to(output)): path for path in _finished(output)}
    paths = set(job.input.path)
    if paths <= set(_WHOLE):
        names = {
            str(path.relative_to(folder / "in")) for path in (folder / "in").rglob("*.parquet")
        }
        if names != finished.keys():
            raise Broken("files of results are not those of the input", ran, str(finished))
    if left := [p for p in output.rglob("*") if p.suffix in (".tmp", ".part")]:
        raise Broken("something is left behind", ran, str(left))
    tables = {name: _read(path) for name, path in finished.items()}
    if len({str(table.schema.remove_metadata()) for table in tables.values()}) > 1:
        raise Broken("files of one output have several schemas", ran)
    for name, table in tables.items():
        _check_results(table, job, ran)
        if paths <= _ROOTS.keys() or all(path == f"in/{name}" for path in paths):
            _Shard(folder / "in" / name, name, job, ran).check(table)
    num_failed = sum(len(t) - t.column("error_type").null_count for t in tables.values())
    return RowCounts(sum(map(len, tables.values())), num_failed)


def stable_results(output: Path) -> dict[str, list[str]]:
    """Of each file, its rows as text, without what may differ between two runs."""
    found = {}
    for path in _finished(output):
        table = _read(path)
        table = table.drop_columns([n for n in CHANGING_COLUMNS if n in table.column_names])
        columns = [_values(column) for column in table.columns]
        found[str(path.relative_to(output))] = [str(row) for row in zip(*columns, strict=True)]
    return found


def _read(path: Path) -> pa.Table:
    """Row group by row group: some nested columns cannot be read over several."""
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
    return pa.concat_tables(groups) if groups else file.schema_arrow.empty_table()


def _finished(output: Path) -> Iterator[Path]:
    for path in sorted(output.rglob("*.parquet")):
        if "_batchinfer" not in path.relative_to(output).parts:
            yield path


def _check_results(table: pa.Table, job: Job, ran: Ended) -> None:
    """What each result by itself must be."""
    kinds = set(table.column("error_type").to_pylist()) - {None}
    if unknown := kinds - ROW_ERROR_KINDS.keys():
        raise Broken(f"error_type {unknown} is none", ran)
    has_error = np.array([e is not None for e in table.column("error_type").to_pylist()], bool)
    for name in ("completion", "finish_reason", "num_completion_tokens", "token_ids"):
        if (is_null := table.column(name).is_null().to_numpy()).tolist() != has_error.tolist():
            raise Broken(f"{name} beside error_type", ran, f"{is_null} {has_error}")
    tokens = table.column("num_completion_tokens").to_pylist()
    most = _MAX_TOKENS if job.sampling.per_row.max_tokens else job.sampling.max_tokens
    if any(number is not None and not 1 <= number <= most for number in tokens):
        raise Broken("completions are longer than max_tokens", ran, str(tokens))


class _Shard:
    """One input file and what its results must be."""

    def __init__(self, path: Path, name: str, job: Job, ran: Ended) -> None:
        self._name, self._job, self._ran = name, job, ran
        self._table = _read(path)
        pairs = (part.partition("=") for part in name.split("/")[:-1] if "=" in part)
        self._folders = {unquote(key): unquote(value) for key, _, value in pairs}

    def check(self, results: pa.Table) -> None:
        rows = results.column("row").to_pylist()
        samples = results.column("sample").to_pylist()
        if set(results.column("shard").to_pylist()) - {self._name}:
            raise Broken("the shard's name is another", self._ran)
        passing = self._passing()
        if passing is not None:
            wanted = [(row, sample) for row in passing for sample in range(self._job.sampling.n)]
            if list(zip(rows, samples, strict=True)) != wanted:
                raise Broken("rows are missing, or too many", self._ran, f"{rows} of {wanted}")
        source = self._job.input
        ids = [f"{self._name}:{row}" for row in rows]
        if source.id_column is None and results.column("id").to_pylist() != ids:
            raise Broken("ids are not shard:row", self._ran)
        carried = {name: name for name in source.keep_columns}
        if source.id_column is not None:
            carried["id"] = source.id_column
        for name, of_input in carried.items():
            before = _taken(self._column(of_input), rows)
            if not _is_same(before, results.column(name)):
                detail = f"{before.type} {before}\n{results.column(name).type}"
                raise Broken(
                    "kept values are others", self._ran, f"{detail} {results.column(name)}"
                )
        self._check_prompts(results, rows)

    def _check_prompts(self, results: pa.Table, rows: list[int]) -> None:
        names = prompts.needed_columns(self._job)
        if not names:
            return
        columns = {name: self._rows_of(name, rows) for name in names}
        most = own.max_tokens_of(self._job, lambda name: self._rows_of(name, rows), len(rows))
        if most is None:
            return
        wanted = prompts.expected(self._job, columns, most)
        may_be_wrong = own.may_be_wrong(
            self._job, lambda name: self._rows_of(name, rows), len(rows)
        )
        given = list(zip(*(results.column(n).to_pylist() for n in _OF_PROMPT), strict=True))
        expected = zip(wanted or (), most, may_be_wrong, strict=wanted is not None)
        for (prompt, limit, may_fail), found in zip(expected, given, strict=wanted is not None):
            if found[0] == own.WRONG and may_fail:
                continue
            if isinstance(prompt, str):
                right = (prompt, None, None)
            else:
                tokens = prompts.completion_tokens(self._job, prompt, int(limit))
                right = (None, len(prompt), found[2] if tokens is None else tokens)
            if found != right:
                raise Broken("the prompt is another", self._ran, f"{found} instead of {right}")

    def _rows_of(self, name: str, rows: list[int]) -> pa.ChunkedArray:
        return _taken(_plain(self._column(name)), rows)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name in self._folders and name not in self._table.column_names:
            value = self._folders[name]
            is_null = value == "__HIVE_DEFAULT_PARTITION__"
            scalar = pa.scalar(None if is_null else value, pa.string())
            return pa.chunked_array([pa.repeat(scalar, len(self._table))])
        return self._table.column(name)

    def _passing(self) -> list[int] | None:
        """Rows that the filter is true for, by polars over the whole file; None: it cannot say."""
        sql = self._job.input.filter
        num_rows = len(self._table)
        if sql is None:
            return list(range(num_rows))
        try:
            expression = pl.sql_expr(sql)
            names = dict.fromkeys(expression.meta.root_names())
            if not names:
                return None
            columns = {name: _with_valid_text(_plain(self._column(name))) for name in names}
            frame = pl.from_arrow(pa.table(columns))
            passes = frame.select(expression.alias("passes")).to_series().to_list()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException):
            return None
        return [row for row in range(num_rows) if passes[row] is True]


def _taken(column: pa.ChunkedArray, rows: list[int]) -> pa.ChunkedArray:
    try:
        return column.take(pa.array(rows, pa.int64()))
    except pa.ArrowException:  # there are types that Arrow takes no rows of
        chunks = [chunk for row in rows for chunk in column.slice(row, 1).chunks]
        return pa.chunked_array(chunks, column.type)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    while isinstance(column.type, pa.BaseExtensionType):
        storage = [chunk.storage for chunk in column.chunks]
        column = pa.chunked_array(storage, column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        return _plain(column.cast(column.type.value_type))
    if pa.types.is_string_view(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.string())
    return column


def _with_valid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """polars ends the process on text that is not UTF-8."""
    if not pa.types.is_string(column.type):
        return column
    values = column.cast(pa.binary()).to_pylist()
    texts = [None if value is None else value.decode(errors="replace") for value in values]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _is_same(before: pa.ChunkedArray, after: pa.ChunkedArray) -> bool:
    """Whether they hold the same values, however they are stored."""
    with contextlib.suppress(pa.ArrowException):
        if _plain(before).cast(after.type).equals(after):
            return True
    return _values(before) == _values(after)


def _values(column: pa.ChunkedArray) -> list[str]:
    """Each value as text that tells it from all others; times by their number."""
    return [_text(scalar) for chunk in column.chunks for scalar in chunk]


def _text(scalar: pa.Scalar) -> str:
    kinds = pa.types
    data_type = scalar.type
    if not scalar.is_valid:
        return "null"
    if isinstance(data_type, pa.BaseExtensionType):
        return _text(scalar.value)
    if kinds.is_dictionary(data_type):
        return _text(scalar.value)
    if kinds.is_map(data_type):
        return f"{{{', '.join(_text(entry) for entry in scalar.values)}}}"
    if kinds.is_struct(data_type):
        fields = (scalar[index] for index in range(data_type.num_fields))
        return f"({', '.join(_text(field) for field in fields)})"
    if kinds.is_nested(data_type):
        return f"[{', '.join(_text(entry) for entry in scalar.values)}]"
    if hasattr(scalar, "value") and not kinds.is_decimal(data_type):
        return repr(scalar.value)
    if hasattr(scalar, "as_buffer"):
        stored = scalar.as_buffer().to_pybytes()
        # What is no UTF-8 is replaced, so that every reader can open the output.
        is_text = "string" in str(data_type)
        return repr(stored.decode("utf-8", "replace") if is_text else stored)
    return _python_text(scalar.as_py())


def _python_text(value: Any) -> str:
    if isinstance(value, uuid.UUID):
        return repr(value.bytes)
    return format(value, "f") if isinstance(value, Decimal) else repr(value)
