"""Prompters of the demo model's tokenizer, and what they made of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchinfer.config import PromptSettings
from batchinfer.prompt import Prepared, Prompter, PromptLimit

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
MODEL = str(DEMO / "model")
BEFORE = "<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(**settings: Any) -> PromptSettings:
    return PromptSettings.model_validate(settings)


def prompter(
    *, max_model_len: int = 2048, max_tokens: int = 48, path: str = MODEL, **settings: Any
) -> Prompter:
    return Prompter(
        prompt_of(**settings),
        path,
        limit=PromptLimit.of_generation(max_model_len=max_model_len, max_tokens=max_tokens),
        vocab_size=4096,
    )


def chat(content: str = "{{ text }}", **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **settings}


def rows_of(prepared: Prepared) -> list[list[int]]:
    bounds = zip(prepared.offsets[:-1], prepared.offsets[1:], strict=True)
    return [prepared.token_ids[start:stop].tolist() for start, stop in bounds]


def texts_of(prepared: Prepared, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows_of(prepared)]


def kinds_of(prepared: Prepared) -> dict[int, str]:
    lengths = np.diff(prepared.offsets)
    assert all(lengths[index] == 0 for index in prepared.errors)
    assert all(length > 0 or index in prepared.errors for index, length in enumerate(lengths))
    return {index: error.kind for index, error in prepared.errors.items()}


def table(*texts: object, name: str = "text") -> pa.Table:
    return pa.table({name: pa.array(texts)})
