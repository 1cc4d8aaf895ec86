"""A table of rows to prompts that are each sampled in their own way, as columns say.

What a row may ask for bounds its prompt, so both are read together. Must not know: engines, what is
generated. Invariants: a null is the job's own value, whatever cannot be a row's value is an error
of that row, and rows that are sampled alike share one object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from batchinfer.config import CONSTRAINTS, OwnSampling, PerRowSettings, SamplingSettings
from batchinfer.config.problems import translate
from batchinfer.config.yaml12 import MAX_DEPTH
from batchinfer.errors import InputError, RowError
from batchinfer.prompt.encode import Int32Array, Int64Array, TokenEncoder
from batchinfer.prompt.limit import PromptLimit
from batchinfer.prompt.prepared import Prepared
from batchinfer.prompt.tokenize import Prompter
from batchinfer.prompt.values import column_values, is_list, stored_type

#: Ways of sampling that are remembered: where each row has its own, none is worth it.
_MAX_KNOWN = 4096
_SECTION = "sampling.per_row"


class OwnSamplingPrompter:
    """See `Prompter`, whose place it takes."""

    def __init__(
        self,
        prompts: Prompter,
        sampling: SamplingSettings,
        max_model_len: int,
        adapters: Collection[str] = (),
        *,
        vocab_size: int,
    ) -> None:
        """`adapters`: names of those that rows may be computed with."""
        self._prompts = prompts
        self._adapters = adapters
        self._sampling = sampling
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._own_columns = sampling.per_row.columns
        names = (*prompts.columns, *self._own_columns.values())
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(names))
        self.limit = prompts.limit
        self._known: dict[str, SamplingSettings | RowError] = {}
        self._limits: dict[int, PromptLimit] = {}

    @property
    def encoder(self) -> TokenEncoder:
        return self._prompts.encoder

    def prepare(self, table: pa.Table) -> Prepared:
        """Prompts of all rows, with `own`. Raises InputError as `Prompter.prepare` does."""
        check_own_columns(self._sampling.per_row, table.schema)
        columns = [column_values(table.column(name)) for name in self._own_columns.values()]
        rows = zip(*columns, strict=True)
        found = [self._of_row(dict(zip(self._own_columns, row, strict=True))) for row in rows]
        limits = [o if isinstance(o, RowError) else self._limit(o.sampling) for o in found]
        prepared = self._prompts.prepare(table, limits)
        own = np.empty(len(found), np.object_)
        for index, one in enumerate(found):
            own[index] = None if index in prepared.errors else one
        return replace(prepared, own=own)

    def decode(self, token_ids: Int32Array, offsets: Int64Array) -> list[str]:
        """Text of each [offsets[i], offsets[i + 1]) without special tokens."""
        return self._prompts.decode(token_ids, offsets)

    def _of_row(self, values: dict[str, Any]) -> OwnSampling | RowError:
        """`values`: by setting, as they are in the columns."""
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if isinstance(value, RowError):
                return self._error(name, value.message)
        seed, lora = given.pop("seed", None), given.pop("lora", None)
        if lora is not None and lora not in self._adapters:
            known = ", ".join(sorted(self._adapters))
            return self._error("lora", f"there is no adapter {lora!r}; model.adapters has {known}")
        key = repr(given)
        if (sampling := self._known.get(key)) is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known = {}
            sampling = self._known[key] = self._read(given)
        if isinstance(sampling, RowError):
            return sampling
        if seed is None:
            return OwnSampling(sampling, lora=lora)
        if isinstance(seeded := self._read({"seed": seed}), RowError):
            return seeded
        return OwnSampling(sampling, seeded.seed, lora)

    def _read(self, given: Mapping[str, Any]) -> SamplingSettings | RowError:
        constraints = [name for name in CONSTRAINTS if name in given]
        if len(constraints) > 1:
            return self._error(constraints[0], f"the row also has a {constraints[1]}")
        try:
            read = {name: _READ.get(name, _as_it_is)(value) for name, value in given.items()}
            own = self._sampling.of_row(read)
        except ValidationError as error:
            key, problem = next(translate(error, SamplingSettings))
            last = key.removeprefix("structured.").partition(".")[0]
            return self._error(last, problem)
        except ValueError as error:
            return self._error(constraints[0], str(error))
        if own.max_tokens >= self._max_model_len:
            return self._error(
                "max_tokens",
                f"{own.max_tokens} leaves no room for a prompt in max_model_len "
                f"{self._max_model_len}",
            )
        if beyond := [i for i in own.stop_token_ids if i >= self._vocab_size]:
            return self._error(
                "stop_token_ids",
                f"{beyond[0]} is not a token of the model, whose vocabulary has "
                f"{self._vocab_size:,}",
            )
        return own

    def _limit(self, sampling: SamplingSettings) -> PromptLimit:
        most = sampling.max_tokens
        if most not in self._limits:
            self._limits[most] = PromptLimit.of_generation(
                max_model_len=self._max_model_len, max_tokens=most
            )
        return self._limits[most]

    def _error(self, name: str, problem: str) -> RowError:
        column = self._own_columns.get(name)
        where = f"sampling.{name}" if column is None else f"column {column!r} ({_SECTION}.{name})"
        return RowError("invalid_setting", f"{where}: {problem}")


def check_own_columns(per_row: PerRowSettings, schema: pa.Schema) -> None:
    """Raise InputError for a column of a type that no value of its setting has."""
    for name, column in per_row.columns.items():
        found = stored_type(schema.field(column).type)
        is_right, wanted = _TYPES.get(name, _NUMBERS)
        if not is_right(found) and not pa.types.is_null(found):
            raise InputError(f"{_SECTION}.{name}: column {column!r} is {found}, not {wanted}")


def _as_it_is(value: Any) -> Any:
    return value


def _number(value: Any) -> Any:
    """That of a column of decimals, which comes as text."""
    return float(value) if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    """A whole number of a column of floats, which a column of integers with nulls often becomes,
    or of decimals; a list of them.
    """
    if isinstance(value, list):
        return [_whole(one) for one in value]
    exact = Decimal(value) if isinstance(value, str) else value
    is_whole = isinstance(exact, float | Decimal) and math.isfinite(exact) and exact == int(exact)
    return int(exact) if is_whole else _number(value)


def _document(text: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if _is_deep(document):
        raise ValueError(f"has values in values more than {MAX_DEPTH} deep")
    return document


def _is_deep(document: Any) -> bool:
    """Deeper than a job file may be: what reads a schema is recursive."""
    left = [(document, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            return True
        if isinstance(value, dict | list):
            below = value.values() if isinstance(value, dict) else value
            left += [(one, depth + 1) for one in below]
    return False


def _is_number(data_type: pa.DataType) -> bool:
    types = pa.types
    kinds = (types.is_integer, types.is_floating, types.is_decimal)
    return any(is_kind(data_type) for is_kind in kinds)


def _is_text(data_type: pa.DataType) -> bool:
    types = pa.types
    kinds = (types.is_string, types.is_large_string, types.is_string_view)
    return any(is_kind(data_type) for is_kind in kinds)


def _is_texts(data_type: pa.DataType) -> bool:
    return is_list(data_type) and _is_text(stored_type(data_type.value_type))


def _is_numbers(data_type: pa.DataType) -> bool:
    return is_list(data_type) and _is_number(stored_type(data_type.value_type))


_Check = tuple[Callable[[pa.DataType], bool], str]
_NUMBERS: _Check = (_is_number, "numbers")
_TEXTS: _Check = (_is_text, "text")
#: Of those settings that are not numbers: what types their columns may have.
_TYPES: Mapping[str, _Check] = {
    "stop": (lambda found: _is_text(found) or _is_texts(found), "text or lists of texts"),
    "stop_token_ids": (_is_numbers, "lists of integers"),
    "ignore_eos": (pa.types.is_boolean, "true or false"),
    "json_schema": (_is_text, "text (JSON)"),
    "regex": _TEXTS,
    "choice": (_is_texts, "lists of texts"),
    "grammar": _TEXTS,
    "lora": _TEXTS,
}
_FRACTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
#: How a column's value becomes that of the setting.
_READ: Mapping[str, Callable[[Any], Any]] = {
    "max_tokens": _whole,
    "top_k": _whole,
    "seed": _whole,
    "logprobs": _whole,
    "stop_token_ids": _whole,
    "json_schema": _document,
    **dict.fromkeys(_FRACTIONS, _number),
}
