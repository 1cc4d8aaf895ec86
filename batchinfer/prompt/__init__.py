"""Rows to prompts: templates, chat templates, tokens, and prompts that are too long."""

from batchinfer.prompt.drafts import (
    check_references,
    check_type,
    needed_columns,
    prompt_columns,
)
from batchinfer.prompt.limit import PromptLimit
from batchinfer.prompt.remarks import Remark, sentence
from batchinfer.prompt.scored import (
    GIVEN,
    RowPrompter,
    ScoredPrompter,
    check_completion_type,
    completion_source,
)
from batchinfer.prompt.tokenize import TEXT_BYTES, Prepared, Prompter, joined_counts
from batchinfer.prompt.values import column_values
from batchinfer.prompt.wording import written as written_column

__all__ = [
    "GIVEN",
    "TEXT_BYTES",
    "Prepared",
    "PromptLimit",
    "Prompter",
    "Remark",
    "RowPrompter",
    "ScoredPrompter",
    "check_completion_type",
    "check_references",
    "check_type",
    "column_values",
    "completion_source",
    "joined_counts",
    "needed_columns",
    "prompt_columns",
    "sentence",
    "written_column",
]
