"""Rows to prompts: templates, chat templates, tokens, and prompts that are too long."""

from batchinfer.prompt.drafts import (
    check_references,
    check_type,
    needed_columns,
    prompt_columns,
)
from batchinfer.prompt.limit import PromptLimit
from batchinfer.prompt.own_sampling import OwnSamplingPrompter, check_own_columns
from batchinfer.prompt.prepared import Prepared, joined_counts, joined_own
from batchinfer.prompt.remarks import Remark, sentence
from batchinfer.prompt.scored import (
    GIVEN,
    RowPrompter,
    ScoredPrompter,
    check_completion_type,
    completion_source,
)
from batchinfer.prompt.tokenize import TEXT_BYTES, Prompter
from batchinfer.prompt.values import column_values
from batchinfer.prompt.wording import written as written_column

__all__ = [
    "GIVEN",
    "TEXT_BYTES",
    "OwnSamplingPrompter",
    "Prepared",
    "PromptLimit",
    "Prompter",
    "Remark",
    "RowPrompter",
    "ScoredPrompter",
    "check_completion_type",
    "check_own_columns",
    "check_references",
    "check_type",
    "column_values",
    "completion_source",
    "joined_counts",
    "joined_own",
    "needed_columns",
    "prompt_columns",
    "sentence",
    "written_column",
]
