"""Rows to prompts: templates, chat templates, tokens, and prompts that are too long."""

from batchinfer.prompt.drafts import check_references, check_type, prompt_columns
from batchinfer.prompt.remarks import Remark, sentence
from batchinfer.prompt.tokenize import Prepared, Prompter
from batchinfer.prompt.values import column_values

__all__ = [
    "Prepared",
    "Prompter",
    "Remark",
    "check_references",
    "check_type",
    "column_values",
    "prompt_columns",
    "sentence",
]
