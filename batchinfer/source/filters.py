"""`input.filter`: a polars SQL expression that says of each row, by itself, whether it is computed.

Must not know: where rows come from. Invariant: what passes `check` gives the same answer for a row
whatever rows it is read together with and whenever it is asked, so windows, blocks and resumed runs
cannot change it.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.errors import ConfigError, InputError
from batchinfer.source.casts import cast_table
from batchinfer.source.for_polars import type_for_polars
from batchinfer.source.plain import has_uuids
from batchinfer.source.products import Products
from batchinfer.source.text import with_valid_text

if TYPE_CHECKING:
    import polars as pl

_ROW_WISE = "a filter sees one row at a time, so aggregates and window functions are refused"
# What polars puts the time of parsing in place of, so that its expression does not show it.
_CLOCKS = frozenset(
    {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
)
#: polars plans a chain of operations in time that grows with the square and more of its length, and
#: by recursion: 400 OR took 7 s for each file, 5,000 did not end, and 1,000 `||` ended the process.
_MAX_OPERATORS = 200
_CHAINING = frozenset({"and", "or", "not", "when", "+", "-", "*", "/", "%", "||"})
#: Of text, polars guesses their format from all rows.
_GUESSES = re.compile(r"\b(date|timestamp|datetime)\s*\(", re.IGNORECASE)
_OF_DAYS = "the day of a time is CAST(column AS DATE), that of a text STRPTIME(column, '%Y-%m-%d')"
_OF_TIMES = (
    "Write times as DATE '2026-01-31' or TIMESTAMP '2026-01-31 12:00:00', and compare a column "
    "with a time zone as CAST(column AS TIMESTAMP), which is in UTC"
)
_TEXT_OR_COMMENT = r"'[^']*'|--[^\n]*|/\*.*?\*/"
#: Functions of polars' SQL that give integers of fewer than 64 bits, or unsigned ones.
_NARROW_RESULTS = frozenset(
    {
        *("array_length", "bit_count", "bit_length", "char_length", "character_length"),
        *("length", "octet_length", "position", "strpos", "date_part", "extract", "year"),
        *("quarter", "month", "week", "weekday", "day", "dayofmonth", "dayofweek", "dayofyear"),
        *("hour", "minute", "second", "millisecond", "microsecond", "nanosecond", "sign"),
    }
)
_CASTS = ("cast", "try_cast")
#: Names of their types, which may have UNSIGNED and a width after them.
_WHOLE = re.compile(r"u?(tiny|small|medium|big|huge)?int(eger)?\d*|unsigned")
_WHOLE_AHEAD = re.compile(
    rf"({_WHOLE.pattern})\b(\s+(unsigned|integer)\b)?(\s*\(\s*\d+\s*\))?", re.IGNORECASE
)
_NOT_TRUE = re.compile(r"\bis not (true|false)\b", re.IGNORECASE)
_SQL_TOKEN = re.compile(rf'{_TEXT_OR_COMMENT}|"[^"]*"|`[^`]*`|\w+|\|\||\S', re.DOTALL)


class RowFilter:
    """A parsed filter. Raises ConfigError if `sql` is not an expression of a single row."""

    def __init__(self, sql: str) -> None:
        import polars as pl

        self._sql = sql
        if (num_operators := _num_chained(sql)) > _MAX_OPERATORS:
            raise ConfigError(
                f"input.filter has {num_operators:,} operators (AND, OR, WHEN, +, || and so on); "
                f"at most {_MAX_OPERATORS} are planned in reasonable time. Write many values of a "
                "column as `column IN (…)`"
            )
        _check_threads()
        words = " ".join(token for token in _SQL_TOKEN.findall(sql) if token[0] != "'")
        if _NOT_TRUE.search(words):
            raise ConfigError(
                f"input.filter {sql!r}: of a null, `IS NOT TRUE` is null in polars and true in "
                "SQL. Write (x) = FALSE OR (x) IS NULL"
            )
        try:
            pl.sql_expr(sql)  # what it says is said of the text as it was given
            self._expression = pl.sql_expr(_with_wide_results(sql, "hugeint"))
            in_doubles = pl.sql_expr(_with_wide_results(sql, "double"))
            self._products = Products(self._expression, in_doubles, words)
            is_row_wise = _is_row_wise(self._expression)
        except pl.exceptions.PolarsError as error:
            raise ConfigError(f"input.filter {sql!r} is not a SQL expression: {error}") from None
        except pl.exceptions.PanicException as error:
            raise ConfigError(
                f"input.filter {sql!r} is not understood by polars: {error}"
            ) from None
        if _ends_with_a_name(sql):
            name = self._expression.meta.output_name()
            raise ConfigError(
                f"input.filter {sql!r}: SQL reads {name!r} at its end as a name for the condition, "
                "which has no use here. Join conditions by AND or OR, and write numbers without _"
            )
        if not is_row_wise:
            hint = f"; {_OF_DAYS}" if _GUESSES.search(sql) else ""
            raise ConfigError(f"input.filter {sql!r} is not row-wise: {_ROW_WISE}{hint}")
        if clock := _clock_in(sql):
            raise ConfigError(
                f"input.filter {sql!r} depends on the current time ({clock}), so each start would "
                "keep different rows: write the time out, such as timestamp '2026-01-31 12:00:00'"
            )
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(self._expression.meta.root_names()))
        if not self.columns:
            raise ConfigError(
                f"input.filter {sql!r} reads no column, so it keeps all rows or none: write a "
                "column's name bare or in double quotes; single quotes are for text"
            )

    def check(self, schema: pa.Schema, partitions: Iterable[str] = ()) -> None:
        """Raise ConfigError unless the filter is boolean over these columns and partitions."""
        import polars as pl

        available = {field.name: field.type for field in schema}
        available |= {name: pa.string() for name in partitions}
        for name in self.columns:
            if name not in available:
                raise ConfigError(
                    f"input.filter {self._sql!r}: there is no column {name!r}"
                    f"{_did_you_mean(name, list(available))}"
                )
            if name in schema.names and has_uuids(schema.field(name)):
                raise ConfigError(
                    f"input.filter {self._sql!r} does not fit the input: column {name!r} holds "
                    "UUIDs, of which polars would compare the 16 bytes with a text"
                )
        # A row, as polars takes an empty column of types that it cannot read.
        types = {name: self._type_for_polars(name, available[name]) for name in self.columns}
        nulls = pa.table({name: pa.nulls(1, kind) for name, kind in types.items()})
        try:
            dtypes = _frame(nulls).select(self._expression).dtypes
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            # What is in brackets there is advice for whoever calls polars from Python.
            reason = re.sub(r" \(create native python.*", "", str(error).splitlines()[0])
            hint = f". {_OF_TIMES}" if any(map(pa.types.is_temporal, types.values())) else ""
            raise ConfigError(
                f"input.filter {self._sql!r} does not fit the input: {reason}{hint}"
            ) from None
        if dtypes != [pl.Boolean]:
            kind = ", ".join(str(dtype) for dtype in dtypes)
            raise ConfigError(
                f"input.filter {self._sql!r} gives {kind}, not true or false: "
                "compare it with a value"
            )

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows pass; null does not. Raises InputError if a value cannot be computed."""
        import polars as pl

        try:
            # polars takes it for granted that text is UTF-8.
            columns = {name: with_valid_text(table.column(name))[0] for name in self.columns}
            types = {name: self._type_for_polars(name, columns[name].type) for name in columns}
            frame = _frame(cast_table(pa.table(columns), pa.schema(list(types.items()))))
            passes = frame.select(self._expression.alias("passes")).to_series()
            wrong = self._products.wrong_row(frame, passes)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"input.filter {self._sql!r} failed: {reason}") from None
        if wrong is not None:
            values = ", ".join(f"{name} = {value}" for name, value in wrong.items())
            raise InputError(
                f"input.filter {self._sql!r}: where {values}, a product needs more than 128 bits. "
                "Write CAST(column AS DOUBLE) for its factors"
            )
        if len(passes) != table.num_rows:
            raise ConfigError(f"input.filter {self._sql!r} is not row-wise: {_ROW_WISE}")
        return passes.fill_null(False).to_numpy()

    def _type_for_polars(self, name: str, kind: pa.DataType) -> pa.DataType:
        """Asked before polars is, which panics on stderr for what it cannot take."""
        try:
            return type_for_polars(kind)
        except ValueError as error:
            raise ConfigError(
                f"input.filter {self._sql!r} does not fit the input: column {name!r}: {error}"
            ) from None


def _check_threads() -> None:
    """polars panics in its first operation, whatever that is."""
    given = os.environ.get("POLARS_MAX_THREADS")
    if given is not None and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise ConfigError(
            f"the environment variable POLARS_MAX_THREADS={given!r} must be a whole number from 1 "
            "on: correct it or unset it"
        )


def _frame(table: pa.Table) -> pl.DataFrame:
    """For polars, in types whose arithmetic does not wrap around."""
    import polars as pl

    for index, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            # What they are compared with would become nanoseconds too, which end in 2262.
            with suppress(pa.ArrowInvalid):  # digits below a microsecond stay
                column = table.column(index).cast(pa.timestamp("us", field.type.tz))
                table = table.set_column(index, field.name, column)
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    wide = {name: _wide(dtype) for name, dtype in frame.schema.items()}
    return frame.cast({name: kind for name, kind in wide.items() if kind != frame.schema[name]})


def _wide(dtype: Any) -> Any:
    """Integers with 128 bits: polars' `qty - 5` of an unsigned 0 is four billion, and `cents * 2`
    of 32 bits may be negative.
    """
    import polars as pl

    if dtype.is_integer():
        return pl.Int128()
    if isinstance(dtype, pl.List):
        return pl.List(_wide(dtype.inner))
    if isinstance(dtype, pl.Array):
        return pl.Array(_wide(dtype.inner), dtype.size)
    if isinstance(dtype, pl.Struct):
        return pl.Struct([pl.Field(field.name, _wide(field.dtype)) for field in dtype.fields])
    return dtype


def _with_wide_results(sql: str, wide: str) -> str:
    """The same where functions and casts give integers: `length` gives unsigned ones, the 8 bits of
    `EXTRACT(MONTH ...)` do not hold a hundred of them, nor the 32 of `CAST(price AS INT)` twice it.

    `wide`: the type that they get, hugeint or double.
    """
    tokens = list(_SQL_TOKEN.finditer(sql))
    words = [token[0].strip('"`').lower() for token in tokens]
    opened: list[str] = []  # what is before each open parenthesis
    ends: list[str] = []  # what is to follow it
    marks: list[tuple[int, str]] = []
    for number, (token, word) in enumerate(zip(tokens, words, strict=True)):
        before = words[number - 1] if number else ""
        if word == "(":
            opened.append(before)
            ends.append("")
            if before in _NARROW_RESULTS:
                marks.append((tokens[number - 1].start(), "("))
                # Not a cast: EXTRACT(EPOCH ...) and others give floats, which stay floats.
                ends[-1] = f" + CAST(0 AS {wide}))"
        elif word == ")" and opened:
            opened.pop()
            marks.append((token.end(), ends.pop()))
        elif before == "as" and opened and opened[-1] in _CASTS and _WHOLE.fullmatch(word):
            ends[-1] = f"::{wide}"
        elif words[max(0, number - 2) : number] == [":", ":"] and (
            found := _WHOLE_AHEAD.match(sql, token.start())
        ):
            marks.append((found.end(), f"::{wide}"))
    for position, text in sorted(marks, reverse=True):
        sql = sql[:position] + text + sql[position:]
    return sql


def _ends_with_a_name(sql: str) -> bool:
    """`n > 1 x` is `n > 1 AS x`, as in the columns of a SELECT; in parentheses it is none."""
    import polars as pl

    try:
        pl.sql_expr(f"(\n{sql}\n)")  # a comment may end it
    except pl.exceptions.PolarsError:
        return True
    return False


def _num_chained(sql: str) -> int:
    """Operators that a chain can be made of; the sign of a value in a list is none."""
    tokens = [token.lower() for token in _SQL_TOKEN.findall(sql)]
    return sum(
        token in _CHAINING and not (token in "+-" and before in ("(", ","))
        for before, token in itertools.pairwise(["", *tokens])
    )


def _is_row_wise(expression: pl.Expr) -> bool:
    """polars answers for the outermost operation only, so `n > avg(n)` passes it: ask each."""
    import polars as pl

    pending = [expression]
    while pending:
        operation = pending.pop()
        try:
            if not (operation.meta.is_literal() or operation.meta.is_row_separable()):
                return False
        except pl.exceptions.ColumnNotFoundError:
            # Division, modulo, IN, ROUND and POW are resolved by the types of their columns, which
            # polars does not know yet. All of that kind work on one row.
            pass
        pending.extend(operation.meta.pop())
    return True


def _clock_in(sql: str) -> str | None:
    """The first function of the current time, as it is written."""
    is_text = re.compile(_TEXT_OR_COMMENT, re.DOTALL).fullmatch
    tokens: list[str] = [token for token in _SQL_TOKEN.findall(sql) if not is_text(token)]
    for before, token, behind in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        if before == ".":  # a field of a struct
            continue
        name = token.strip('"`').lower()
        is_called = behind == "(" and (name in _CLOCKS or name == "now")
        if is_called or token.lower() in _CLOCKS:
            return token
    return None


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the columns are {', '.join(names)}"
