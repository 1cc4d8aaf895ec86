"""Scoring: the log-probability of each token of a text, given the tokens before it.

A row longer than the context goes through the engine in windows that overlap; see `_Windows` for
which window scores which token. Must not know: files, how an engine works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.config import Job, PromptSettings, SamplingSettings, ScoreSettings
from batchinfer.engine.base import Completion, Demand, Int32Array, Timing
from batchinfer.errors import ConfigError, RowError
from batchinfer.model import ModelFacts
from batchinfer.plan import Chunk, WorkItem
from batchinfer.prompt import (
    Prompter,
    PromptLimit,
    ScoredPrompter,
    check_completion_type,
    completion_source,
)
from batchinfer.tasks.arrays import ints, list_sums, lists
from batchinfer.tasks.base import (
    Ask,
    Column,
    Detokenize,
    Result,
    TaskKind,
    logprob_words,
    row_values,
)

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
}
#: What it counts.
COUNTS = ("scored_tokens",)

#: Of a prompt, and of a completion: what is held for a row grows with it (the tokenizer has about
#: 200 bytes for each token while it works).
MAX_ROW_TOKENS = 1 << 22

_TIMES = ("queued_s", "prefill_s", "decode_s", "total_s")


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
    def demand(self) -> Demand:
        sampling = SamplingSettings(max_tokens=1, logprobs=0, prompt_logprobs=True)
        return Demand(self.name, sampling, wants="prompt_logprobs")

    @property
    def columns(self) -> Mapping[str, Column]:
        return COLUMNS

    @property
    def counts(self) -> Sequence[str]:
        return COUNTS

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"task": self.name, "score": self.settings.model_dump(mode="json")}

    @property
    def input_columns(self) -> Sequence[str]:
        column = self.settings.completion_column
        return () if column is None else (column,)

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
        if self._stride(max_model_len) >= self._context(max_model_len):
            raise ConfigError(
                f"score.stride {self.settings.stride} must be less than the context, here "
                f"{self._context(max_model_len)} tokens"
            )
        return PromptLimit(MAX_ROW_TOKENS, f"exceed the {MAX_ROW_TOKENS} that a row may have")

    def work(self, item: WorkItem, max_model_len: int) -> _Windows:
        num_given = item.chunk.num_given
        return _Windows(
            item.chunk.prompt(item.index).copy(),  # not a view that holds the whole chunk
            0 if num_given is None else int(num_given[item.index]),
            context=self._context(max_model_len),
            stride=self._stride(max_model_len),
            max_prompt_tokens=max_model_len - 1,
        )

    def _context(self, max_model_len: int) -> int:
        """Most tokens of a window."""
        return self.settings.context or max_model_len

    def _stride(self, max_model_len: int) -> int:
        return self.settings.stride or self._context(max_model_len) // 2

    def num_tokens(self, completion: Completion) -> int:
        return _num_scored(completion)

    def arrays(self, results: Sequence[Result], detokenize: Detokenize) -> Mapping[str, pa.Array]:
        done = [r.completion for r in results]
        is_error = np.array([c.error_type is not None for c in done], dtype=np.bool_)
        logprobs = lists([c.token_logprobs for c in done], np.float32)
        known = pa.array(logprobs.values.to_numpy(), from_pandas=True)  # NaN -> null
        is_null = logprobs.is_null()
        num_prompt_tokens = row_values(results, self._prompt_tokens)
        num_bytes = row_values(results, _text_bytes)
        return {
            "num_prompt_tokens": pa.array(num_prompt_tokens, mask=num_prompt_tokens == 0),
            "num_scored_tokens": ints([_num_scored(c) for c in done], is_error),
            "num_text_bytes": pa.array(num_bytes, mask=is_error | (num_bytes < 0)),
            "token_ids": lists([None if c.error_type else c.token_ids for c in done], np.int32),
            "token_logprobs": pa.ListArray.from_arrays(logprobs.offsets, known, mask=is_null),
            "cumulative_logprob": list_sums(
                pa.ListArray.from_arrays(logprobs.offsets, known.fill_null(0.0), mask=is_null)
            ),
        }

    def _prompt_tokens(self, chunk: Chunk) -> npt.NDArray[np.int32]:
        """Of each row of a chunk. [n]"""
        if self.settings.completion_column is None or chunk.num_given is None:
            return np.diff(chunk.offsets).astype(np.int32)
        return chunk.num_given.astype(np.int32)

    def count(self, table: pa.Table) -> Mapping[str, int]:
        return {"scored_tokens": pc.sum(table.column("num_scored_tokens")).as_py() or 0}

    def remarks(self, num_done: int, counts: Mapping[str, int | None]) -> tuple[()]:
        return ()


class _Windows:
    """A row of n tokens, of which the first `num_given` are not scored.

    Window k is the tokens from k * stride on, at most `context` of them. It scores those that no
    earlier window has, so each token is scored once, and past the first window with at least
    context - stride tokens before it. A window that would score none is left out. The first token
    of a row has nothing before it, and no logprob.

    An engine generates a token for each request and needs room for it. It is dropped, except where
    a window fills the model: then it is made to be the window's last token.
    """

    __slots__ = (
        "_context",
        "_logprobs",
        "_max_prompt_tokens",
        "_num_given",
        "_stride",
        "_times",
        "_token_ids",
    )

    def __init__(
        self,
        token_ids: Int32Array,
        num_given: int,
        *,
        context: int,
        stride: int,
        max_prompt_tokens: int,
    ) -> None:
        self._max_prompt_tokens = max_prompt_tokens
        self._token_ids = token_ids
        self._num_given = num_given
        self._context = context
        self._stride = stride
        self._logprobs = np.full(len(token_ids), np.nan, np.float32)
        self._times: dict[str, float] = {}

    def asks(self) -> Iterator[Ask]:
        num_tokens = len(self._token_ids)
        start, stop = 0, 0
        while stop < num_tokens:
            stop = min(start + self._context, num_tokens)
            if stop > self._first_scored(start):
                yield self._ask(start, stop)
            start += self._stride

    def _ask(self, start: int, stop: int) -> Ask:
        window = self._token_ids[start:stop]
        if len(window) <= self._max_prompt_tokens:
            return Ask(window, start=start)
        return Ask(window[:-1], next_token=int(window[-1]), start=start)

    def _first_scored(self, start: int) -> int:
        """Position of the first token that the window from `start` on scores."""
        before = start - self._stride + self._context if start else 0
        return max(before, self._num_given, 1)

    def add(self, ask: Ask, completion: Completion) -> None:
        logprobs = completion.prompt_token_logprobs
        if logprobs is None or len(logprobs) != len(ask.token_ids):
            raise RowError("engine_error", "the engine did not give each token a logprob")
        if ask.next_token is not None:
            last = completion.token_logprobs
            if last is None or completion.token_ids.tolist() != [ask.next_token]:
                raise RowError("engine_error", "the engine did not end with the token it was given")
            logprobs = np.concatenate([logprobs, last])
        first = self._first_scored(ask.start)
        scored = logprobs[first - ask.start :]
        if not np.isfinite(scored).all():
            bad = int(np.flatnonzero(~np.isfinite(scored))[0])
            raise RowError(
                "engine_error", f"the logprob of token {first + bad} of the row is {scored[bad]}"
            )
        self._logprobs[first : first + len(scored)] = scored
        for name in _TIMES:
            if (seconds := getattr(completion.timing, name)) is not None:
                self._times[name] = self._times.get(name, 0.0) + seconds

    def completion(self) -> Completion:
        """Its tokens are those of the scored text; a logprob is NaN where there is none."""
        return Completion(
            key=-1,
            token_ids=self._token_ids[self._num_given :],
            token_logprobs=self._logprobs[self._num_given :],
            timing=Timing(**self._times),
        )


def describe(row: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """See `Describe`."""
    return None, [f"{row['num_scored_tokens']} tokens scored", *logprob_words(row)]


def _num_scored(completion: Completion) -> int:
    if completion.token_logprobs is None:
        return 0
    return int(np.count_nonzero(~np.isnan(completion.token_logprobs)))


def _text_bytes(chunk: Chunk) -> npt.NDArray[np.int64]:
    """Of each row of a chunk, -1: unknown. [n]"""
    if chunk.num_text_bytes is None:
        return np.full(len(chunk.rows), -1, np.int64)
    return chunk.num_text_bytes


KIND = TaskKind(lambda job: Score(job.score), COLUMNS, COUNTS, describe)
