"""What a row's result must be, where that is simple: the fake engine's completion depends on the
prompt's tokens alone, so a row that was given another row's prompt, or another text, shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from batchinfer.config import Job
from tests.support.jobs import MODEL

_CONTEXT = 2048
_VOCAB_SIZE = 4096
_PRINTED = re.compile(r"(\{\{ \w+ \}\})")
_TEMPLATE = re.compile(r"(?:[\w .:]|\{\{ \w+ \}\})*")


def needed_columns(job: Job) -> list[str] | None:
    """Columns of which the prompt is made, None where it is not simple."""
    prompt = job.prompt
    if prompt.on_too_long != "error":
        return None
    if prompt.column is not None or prompt.token_ids_column is not None:
        return [prompt.column or prompt.token_ids_column or ""]
    if prompt.template is not None and _TEMPLATE.fullmatch(prompt.template):
        names = [piece[3:-3] for piece in _PRINTED.findall(prompt.template)]
        return names if set(names) - {"row"} == set(names) else None
    return None


def expected(
    job: Job, columns: dict[str, pa.ChunkedArray], most: Sequence[int | str]
) -> list[str | list[int]] | None:
    """For each row the kind of its error, or its prompt's tokens. `most`: see `max_tokens_of`."""
    is_right = _holds_token_ids if job.prompt.token_ids_column else pa.types.is_string
    if not all(is_right(column.type) for column in columns.values()):
        return None
    rows = zip(*(map(_value, column) for column in columns.values()), strict=True)
    context = job.model.max_model_len or _CONTEXT
    return [
        own
        if isinstance(own, str)
        else _expected(job, dict(zip(columns, row, strict=True)), context - own)
        for row, own in zip(rows, most, strict=True)
    ]


def _holds_token_ids(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_list(data_type) and pa.types.is_integer(data_type.value_type))


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return UnicodeDecodeError


def _expected(job: Job, row: dict[str, Any], max_tokens: int) -> str | list[int]:
    if None in row.values():
        return "missing_value"
    if UnicodeDecodeError in row.values():
        return "invalid_prompt"
    if job.prompt.token_ids_column is not None:
        (ids,) = row.values()
        if any(entry is None or not 0 <= entry < _VOCAB_SIZE for entry in ids):
            return "invalid_prompt"
    else:
        (text,) = row.values() if job.prompt.column is not None else [_rendered(job, row)]
        ids = _tokenizer().encode(text).ids
    if not ids:
        return "empty_prompt"
    return "prompt_too_long" if len(ids) > max_tokens else ids


def _rendered(job: Job, row: dict[str, Any]) -> str:
    assert job.prompt.template is not None
    pieces = _PRINTED.split(job.prompt.template)
    return "".join(row[piece[3:-3]] if piece.startswith("{{") else piece for piece in pieces)


def completion_tokens(job: Job, prompt: list[int], most: int) -> list[int] | None:
    """What the fake engine makes of a prompt; None under seeds of rows."""
    if job.sampling.uses_seeds:
        return None
    from batchinfer.engine.demands.completion import (
        Completion,
        CompletionDemand,
        CompletionRequest,
    )
    from batchinfer.testing import FakePlan
    from batchinfer.testing.engine import answers_of

    request = CompletionRequest(0, np.array(prompt, np.int32))
    sampling = job.sampling.model_copy(update={"max_tokens": most})
    answers = answers_of(CompletionDemand("generate", sampling), FakePlan())
    token_ids: list[int] = Completion.of(
        answers.answer(request, answers.num_steps(request))
    ).token_ids.tolist()
    return token_ids


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))
