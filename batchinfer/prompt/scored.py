"""A table of rows to the tokens of texts to score: a prompt alone, or a prompt and its completion.

Must not know: windows, engines. Invariant: prompt and completion are tokenized apart, so the
boundary between them is one between tokens, and the completion's tokens do not depend on the
prompt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from batchinfer.config import PromptSettings
from batchinfer.errors import InputError, RowError
from batchinfer.prompt.drafts import check_type
from batchinfer.prompt.encode import Int32Array, Int64Array, TokenEncoder
from batchinfer.prompt.own_sampling import OwnSamplingPrompter
from batchinfer.prompt.prepared import Prepared
from batchinfer.prompt.tokenize import Prompter

#: In `Prepared.counts`: tokens at a row's start that are not scored.
GIVEN = "num_given"


def completion_source(prompt: PromptSettings, column: str) -> PromptSettings:
    """How `score.completion_column` is read: token ids where the prompt's are, else text."""
    key = "column" if prompt.token_ids_column is None else "token_ids_column"
    return PromptSettings.model_validate({key: column})


def check_completion_type(prompt: PromptSettings, column: str, schema: pa.Schema) -> None:
    """Raise InputError if a shard's completion column holds neither text nor token ids."""
    try:
        check_type(completion_source(prompt, column), schema)
    except InputError as error:
        _, _, problem = str(error).partition(": ")
        raise InputError(f"score.completion_column: {problem}") from None


class ScoredPrompter:
    """See `Prompter`, whose place it takes. `completions` None: the prompt itself is scored."""

    def __init__(self, prompts: Prompter, completions: Prompter | None) -> None:
        self._prompts = prompts
        self._completions = completions
        added = completions.columns if completions is not None else ()
        self.columns: tuple[str, ...] = tuple(dict.fromkeys((*prompts.columns, *added)))
        self.limit = prompts.limit

    @property
    def encoder(self) -> TokenEncoder:
        return self._prompts.encoder

    def prepare(self, table: pa.Table) -> Prepared:
        """Tokens of all rows, with `GIVEN`. Raises InputError as `Prompter.prepare` does."""
        prompts = self._prompts.prepare(table)
        if self._completions is None:
            return replace(
                prompts, counts={**prompts.counts, GIVEN: np.zeros(table.num_rows, np.int64)}
            )
        completions = self._completions.prepare(table)
        errors = {i: _of_completion(error) for i, error in completions.errors.items()}
        errors |= prompts.errors
        pieces: list[Int32Array] = [np.empty(0, np.int32)]
        lengths = np.zeros(table.num_rows, np.int64)
        for row in range(table.num_rows):
            if row not in errors:
                ids = (_row(prompts, row), _row(completions, row))
                pieces.extend(ids)
                lengths[row] = sum(map(len, ids))
        return Prepared(
            np.concatenate(pieces),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            dict(sorted(errors.items())),
            prompts.remarks,
            counts={
                **completions.counts,
                GIVEN: np.where(lengths > 0, np.diff(prompts.offsets), 0),
            },
        )

    def decode(self, token_ids: Int32Array, offsets: Int64Array) -> list[str]:
        """Text of each [offsets[i], offsets[i + 1]) without special tokens."""
        return self._prompts.decode(token_ids, offsets)


#: What makes the rows of any job into tokens.
RowPrompter = Prompter | OwnSamplingPrompter | ScoredPrompter


def _row(prepared: Prepared, row: int) -> Int32Array:
    return prepared.token_ids[prepared.offsets[row] : prepared.offsets[row + 1]]


def _of_completion(error: RowError) -> RowError:
    if error.kind == "empty_prompt":
        return RowError(error.kind, "the completion has no tokens")
    return RowError(error.kind, f"the completion: {error.message}")
