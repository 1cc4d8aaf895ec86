"""Columns with rows' own settings: what a job says of them, and what a row then has to be.

Read without batchinfer's rooms, and only as far as it is simple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from batchinfer.config import Job
from tests.fuzz.odds import rarely
from tests.fuzz.tables import Input

_MAX = 2**31 - 1
_CONTEXT = 2048
#: Settings by what their columns hold, as the types of columns begin.
_NUMBERS = ("int", "uint", "float", "double", "half", "decimal")
_TEXTS = ("string", "large_string", "dictionary")
_BEGIN = {
    "max_tokens": _NUMBERS,
    "temperature": _NUMBERS,
    "top_p": _NUMBERS,
    "top_k": _NUMBERS,
    "min_p": _NUMBERS,
    "presence_penalty": _NUMBERS,
    "frequency_penalty": _NUMBERS,
    "repetition_penalty": _NUMBERS,
    "seed": _NUMBERS,
    "logprobs": _NUMBERS,
    "stop": (*_TEXTS, "list<element: string", "list<item: string"),
    "stop_token_ids": ("list<element: int", "list<item: int", "list<item: uint"),
    "ignore_eos": ("bool",),
    "json_schema": _TEXTS,
    "regex": _TEXTS,
    "choice": ("list<element: string", "list<item: string"),
    "grammar": _TEXTS,
}

WRONG = "invalid_setting"


@st.composite
def per_row(draw: st.DrawFn, source: Input, columns: Sequence[str]) -> dict[str, str]:
    """`sampling.per_row`: some settings, mostly with columns of a type that could hold them."""
    fitting = {name: _likely(source, begin) for name, begin in _BEGIN.items()}
    names = [name for name, some in fitting.items() if some]
    if "max_tokens" in names:
        names = ["max_tokens"] * len(names) + names
    found = {}
    if names:
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
            found[name] = draw(st.sampled_from(fitting[name]))
    if rarely(draw, 8):
        name = draw(st.sampled_from([*_BEGIN, "lora"]))
        found[name] = draw(st.sampled_from([*columns, "nosuchcolumn"]))
    return found


def _likely(source: Input, begin: tuple[str, ...]) -> list[str]:
    fields = (field for table in source.tables for field in table.schema)
    return list(dict.fromkeys(f.name for f in fields if f.name and str(f.type).startswith(begin)))


def max_tokens_of(
    job: Job, column_of: Callable[[str], pa.ChunkedArray], num_rows: int
) -> list[int | str] | None:
    """For each row the most tokens of its completion, or WRONG; None where that is not simple."""
    name = job.sampling.per_row.max_tokens
    if name is None:
        return [job.sampling.max_tokens] * num_rows
    column = column_of(name)
    kinds = pa.types
    if not any(
        is_kind(column.type)
        for is_kind in (kinds.is_integer, kinds.is_floating, kinds.is_decimal, kinds.is_null)
    ):
        return None
    context = job.model.max_model_len or _CONTEXT
    return [_most(job, value, context) for value in column.to_pylist()]


def _most(job: Job, value: Any, context: int) -> int | str:
    if value is None:
        return job.sampling.max_tokens
    if isinstance(value, float | Decimal) and (not math.isfinite(value) or value != int(value)):
        return WRONG
    return int(value) if 1 <= value < min(context, _MAX) else WRONG


def may_be_wrong(
    job: Job, column_of: Callable[[str], pa.ChunkedArray], num_rows: int
) -> list[bool]:
    """Of each row whether a column says something of it, which may be no value of the setting."""
    columns = [column_of(name) for name in job.sampling.per_row.columns.values()]
    is_said = [[scalar.is_valid for scalar in column] for column in columns]
    return [any(row) for row in zip(*is_said, strict=True)] if columns else [False] * num_rows
