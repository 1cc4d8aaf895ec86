"""Scoring: the log-probability of each token of a text, given the tokens before it.

A row longer than the context goes through the engine in windows that overlap; see
`ScoringWindows` for which window scores which token. Must not know: files, how an engine works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.config import Job, PromptSettings, SamplingSettings, ScoreSettings
from batchinfer.engine.base import Answer
from batchinfer.engine.demands.completion import Completion
from batchinfer.engine.demands.prompt_logprobs import PromptLogprobsDemand
from batchinfer.errors import ConfigError
from batchinfer.model import ModelFacts
from batchinfer.plan import Chunk, WorkItem
from batchinfer.prompt import (
    GIVEN,
    TEXT_BYTES,
    Prompter,
    PromptLimit,
    ScoredPrompter,
    check_completion_type,
    completion_source,
)
from batchinfer.tasks.arrays import ints, list_sums, lists
from batchinfer.tasks.base import (
    Column,
    Detokenize,
    Result,
    TaskKind,
    row_values,
)
from batchinfer.tasks.scoring_windows import ScoringWindows
from batchinfer.tasks.top_lists import top_lists
from batchinfer.tasks.words import logprob_words

#: Every column of its own, in order.
COLUMNS: Mapping[str, Column] = {
    "num_prompt_tokens": (pa.int32(), "tokens of the prompt after the chat template"),
    "num_scored_tokens": (pa.int32(), "tokens that have a logprob"),
    "num_text_bytes": (pa.int64(), "UTF-8 bytes of the scored text; null for token ids"),
    "token_ids": (pa.list_(pa.int32()), "tokens of the scored text"),
    "token_logprobs": (
        pa.list_(pa.float32()),
        "natural-log probability of each of them; null for a first token with nothing before it",
    ),
    "cumulative_logprob": (pa.float64(), "sum of token_logprobs, in double precision"),
    "top_token_ids": (
        pa.list_(pa.list_(pa.int32())),
        "with score.top_logprobs: the k likeliest tokens at each position, best first",
    ),
    "top_logprobs": (pa.list_(pa.list_(pa.float32())), "their natural-log probabilities"),
}
#: What it counts.
COUNTS = ("scored_tokens",)

#: Of a prompt, and of a completion: what is held for a row grows with it (the tokenizer has about
#: 200 bytes for each token while it works).
MAX_ROW_TOKENS = 1 << 22

_TOP_COLUMNS = ("top_token_ids", "top_logprobs")


@dataclass(frozen=True, slots=True)
class Score:
    """See `Task`."""

    settings: ScoreSettings

    @property
    def name(self) -> str:
        return "score"

    @property
    def num_samples(self) -> int:
        return 1

    @property
    def is_repeatable(self) -> bool:
        return True

    @property
    def max_tokens(self) -> None:
        return None

    @property
    def demand(self) -> PromptLogprobsDemand:
        plain = SamplingSettings(max_tokens=1, logprobs=0, prompt_logprobs=True)
        # Past the most that a job may ask for in `sampling`.
        sampling = plain.model_copy(update={"logprobs": self._num_top})
        return PromptLogprobsDemand(self.name, sampling)

    @property
    def columns(self) -> Mapping[str, Column]:
        without = () if self._num_top else _TOP_COLUMNS
        return {name: column for name, column in COLUMNS.items() if name not in without}

    @property
    def counts(self) -> Sequence[str]:
        return COUNTS

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"task": self.name, "score": self.settings.model_dump(mode="json")}

    @property
    def input_columns(self) -> Mapping[str, str]:
        column = self.settings.completion_column
        return {} if column is None else {column: "score.completion_column"}

    def check_input(self, prompt: PromptSettings, schema: pa.Schema) -> None:
        for column in self.input_columns:
            check_completion_type(prompt, column, schema)

    def prompter(self, job: Job, model: ModelFacts) -> ScoredPrompter:
        limit = self._limit(model.max_model_len)
        prompts = Prompter(
            job.prompt,
            model.tokenizer_path,
            limit=limit,
            vocab_size=model.vocab_size,
            trust_remote_code=job.model.trust_remote_code,
            counts_bytes=True,
        )
        completions = None
        if (column := self.settings.completion_column) is not None:
            completions = Prompter(
                completion_source(job.prompt, column),
                prompts.encoder,
                limit=limit,
                vocab_size=model.vocab_size,
                counts_bytes=True,
                is_continuation=True,
            )
        return ScoredPrompter(prompts, completions)

    def _limit(self, max_model_len: int) -> PromptLimit:
        if self._context(max_model_len) > max_model_len:
            raise ConfigError(
                f"score.context {self.settings.context} is more than the {max_model_len} tokens "
                "that the model takes"
            )
        if max_model_len < 2:
            raise ConfigError(
                f"model.max_model_len {max_model_len} is too short for task: score: the "
                "log-probability of a token needs one token before it. Give at least 2"
            )
        if self._stride(max_model_len) >= self._context(max_model_len):
            raise ConfigError(
                f"score.stride {self.settings.stride} must be less than the context, here "
                f"{self._context(max_model_len)} tokens"
            )
        most = MAX_ROW_TOKENS // (1 + self._num_top)
        return PromptLimit(
            most, f"exceed the {most} that a row may have", f"the {most} tokens that a row may have"
        )

    def work(self, item: WorkItem, max_model_len: int) -> ScoringWindows:
        num_given = item.chunk.counts.get(GIVEN)
        return ScoringWindows(
            item.chunk.prompt(item.index).copy(),  # not a view that holds the whole chunk
            0 if num_given is None else int(num_given[item.index]),
            context=self._context(max_model_len),
            stride=self._stride(max_model_len),
            max_prompt_tokens=max_model_len - 1,
            num_top=self._num_top,
        )

    @property
    def _num_top(self) -> int:
        return self.settings.top_logprobs or 0

    def _context(self, max_model_len: int) -> int:
        """Most tokens of a window."""
        return self.settings.context or max_model_len

    def _stride(self, max_model_len: int) -> int:
        return self.settings.stride or self._context(max_model_len) // 2

    def num_tokens(self, answer: Answer, num_prompt_tokens: int) -> int:
        return _num_scored(Completion.of(answer))

    def arrays(self, results: Sequence[Result], detokenize: Detokenize) -> Mapping[str, pa.Array]:
        done = [Completion.of(r.answer) for r in results]
        is_error = np.array([c.error_type is not None for c in done], dtype=np.bool_)
        logprobs = lists([c.token_logprobs for c in done], np.float32)
        known = pa.array(logprobs.values.to_numpy(), from_pandas=True)  # NaN -> null
        is_null = logprobs.is_null()
        num_prompt_tokens = row_values(results, self._prompt_tokens)
        num_bytes = row_values(results, _text_bytes)
        tops = dict(zip(_TOP_COLUMNS, top_lists(done), strict=True)) if self._num_top else {}
        return {
            "num_prompt_tokens": pa.array(num_prompt_tokens, mask=num_prompt_tokens == 0),
            "num_scored_tokens": ints([_num_scored(c) for c in done], is_error),
            "num_text_bytes": pa.array(num_bytes, mask=is_error | (num_bytes < 0)),
            "token_ids": lists([None if c.error_type else c.token_ids for c in done], np.int32),
            "token_logprobs": pa.ListArray.from_arrays(logprobs.offsets, known, mask=is_null),
            "cumulative_logprob": list_sums(
                pa.ListArray.from_arrays(logprobs.offsets, known.fill_null(0.0), mask=is_null)
            ),
            **tops,
        }

    def _prompt_tokens(self, chunk: Chunk) -> npt.NDArray[np.int32]:
        """Prompt tokens of each row of a chunk. [n]"""
        if self.settings.completion_column is None or GIVEN not in chunk.counts:
            return np.diff(chunk.offsets).astype(np.int32)
        return chunk.counts[GIVEN].astype(np.int32)

    def count(self, table: pa.Table) -> Mapping[str, int]:
        return {"scored_tokens": pc.sum(table.column("num_scored_tokens")).as_py() or 0}

    def remarks(self, num_done: int, counts: Mapping[str, int | None]) -> tuple[()]:
        return ()


def describe(row: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """See `Describe`."""
    return None, [f"{row['num_scored_tokens']} tokens scored", *logprob_words(row)]


def _num_scored(completion: Completion) -> int:
    if completion.token_logprobs is None:
        return 0
    return int(np.count_nonzero(~np.isnan(completion.token_logprobs)))


def _text_bytes(chunk: Chunk) -> npt.NDArray[np.int64]:
    """Bytes of the text of each row of a chunk, -1: unknown. [n]"""
    num_bytes = chunk.counts.get(TEXT_BYTES)
    return np.full(len(chunk.rows), -1, np.int64) if num_bytes is None else num_bytes


KIND = TaskKind(lambda job: Score(job.score), COLUMNS, COUNTS, describe)
