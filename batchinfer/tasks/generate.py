"""Generation: each row's prompt gets `sampling.n` completions.

Must not know: files, how an engine works. Text is detokenized here, in bulk, unless the engine had
to do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.config import Job, OwnSampling, PromptSettings, SamplingSettings
from batchinfer.engine.base import Answer
from batchinfer.engine.demands.completion import Completion, CompletionDemand, CompletionRequest
from batchinfer.errors import ConfigError
from batchinfer.model import ModelFacts
from batchinfer.plan import Chunk, WorkItem, own_seed, request_seed
from batchinfer.prompt import OwnSamplingPrompter, Prompter, PromptLimit, check_own_columns
from batchinfer.tasks.arrays import ints, list_sums, lists
from batchinfer.tasks.base import (
    Ask,
    Column,
    Detokenize,
    OneRequest,
    Result,
    TaskKind,
    num_failed,
    row_values,
)
from batchinfer.tasks.documents import Documents
from batchinfer.tasks.remarks import of_answers, of_documents
from batchinfer.tasks.top_lists import top_lists
from batchinfer.tasks.words import logprob_words

#: Every column that a job of generation can have, in order.
COLUMNS: Mapping[str, Column] = {
    "reasoning": (pa.string(), "what the model thought before it answered; null: nothing"),
    "completion": (pa.string(), "the generated text, without special tokens"),
    "is_reasoning_cut": (pa.bool_(), "it ended within its thought: completion is null"),
    "parsed": (pa.string(), "with json_schema: the completion if it is JSON that fits"),
    "finish_reason": (pa.string(), "stop | length"),
    "stop_reason": (pa.string(), "stop string or stop token id; null for the model's own end"),
    "num_prompt_tokens": (pa.int32(), "tokens of the prompt after the chat template"),
    "num_cached_tokens": (pa.int32(), "prompt tokens found in the prefix cache"),
    "num_completion_tokens": (pa.int32(), "generated tokens, the stop token included"),
    "token_ids": (pa.list_(pa.int32()), "generated tokens, the stop token included"),
    "token_logprobs": (pa.list_(pa.float32()), "natural-log probability of each generated token"),
    "cumulative_logprob": (pa.float64(), "sum of token_logprobs"),
    "top_token_ids": (
        pa.list_(pa.list_(pa.int32())),
        "the k likeliest tokens at each position, best first",
    ),
    "top_logprobs": (pa.list_(pa.list_(pa.float32())), "their natural-log probabilities"),
    "prompt_token_logprobs": (
        pa.list_(pa.float32()),
        "natural-log probability of each prompt token, NaN first",
    ),
}
#: What it counts: tokens generated; completions ended by sampling.max_tokens; with a JSON schema,
#: completions that are not a whole document that fits.
COUNTS = ("completion_tokens", "rows_cut", "rows_unparsed")
#: With a reasoning parser also: completions without an answer, as they ended within the thought.
_REASONING_COUNTS = ("rows_reasoning_cut",)
#: Settings that footers name only where they are set: files without them stay as they were.
_LATER = ("reasoning_parser", "thinking_budget_tokens", "per_row")
_TOP_COLUMNS = ("top_token_ids", "top_logprobs")
_REASONING_COLUMNS = ("reasoning", "is_reasoning_cut")


@dataclass(frozen=True, slots=True)
class CompletionAsk(Ask):
    """See `CompletionRequest`."""

    seed: int | None = None
    own: OwnSampling | None = None

    def request(self, key: int) -> CompletionRequest:
        if self.own is None:
            return CompletionRequest(key, self.token_ids, self.seed)
        sampling, lora = self.own.sampling, self.own.lora
        return CompletionRequest(key, self.token_ids, self.seed, sampling=sampling, lora=lora)


@dataclass(frozen=True, slots=True)
class Generate:
    """See `Task`."""

    settings: SamplingSettings
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return "generate"

    @property
    def num_samples(self) -> int:
        return self.settings.n

    @property
    def is_repeatable(self) -> bool:
        return self.settings.is_greedy or self.settings.per_row.sets("temperature")

    @property
    def max_tokens(self) -> int | None:
        return None if self.settings.per_row.sets("max_tokens") else self.settings.max_tokens

    @property
    def demand(self) -> CompletionDemand:
        return CompletionDemand(self.name, self.settings, self.template_kwargs)

    @property
    def columns(self) -> Mapping[str, Column]:
        without: set[str] = set()
        if not self._has_tops:
            without.update(_TOP_COLUMNS)
        if not self.settings.prompt_logprobs:
            without.add("prompt_token_logprobs")
        if self.settings.reasoning_parser is None:
            without.update(_REASONING_COLUMNS)
        return {name: column for name, column in COLUMNS.items() if name not in without}

    @property
    def counts(self) -> Sequence[str]:
        counts = [name for name in COUNTS if name != "rows_unparsed" or not self._has_own_schemas]
        return counts if self.settings.reasoning_parser is None else [*counts, *_REASONING_COUNTS]

    @property
    def facts(self) -> Mapping[str, Any]:
        settings = self.settings.model_dump(mode="json")
        own = {"per_row": dict(self.settings.per_row.columns)}
        return {"sampling": {k: v for k, v in (settings | own).items() if v or k not in _LATER}}

    @property
    def input_columns(self) -> Mapping[str, str]:
        own = self.settings.per_row.columns
        return {column: f"sampling.per_row.{name}" for name, column in reversed(own.items())}

    def check_input(self, prompt: PromptSettings, schema: pa.Schema) -> None:
        check_own_columns(self.settings.per_row, schema)

    def prompter(self, job: Job, model: ModelFacts) -> Prompter | OwnSamplingPrompter:
        if beyond := [i for i in self.settings.stop_token_ids if i >= model.vocab_size]:
            raise ConfigError(
                f"sampling.stop_token_ids: {beyond[0]} is not a token of {model.path}, whose "
                f"vocabulary has {model.vocab_size:,}"
            )
        prompts = Prompter(
            job.prompt,
            model.tokenizer_path,
            limit=PromptLimit.of_generation(
                max_model_len=model.max_model_len, max_tokens=self.settings.max_tokens
            ),
            vocab_size=model.vocab_size,
            trust_remote_code=job.model.trust_remote_code,
        )
        if not self.settings.per_row.columns:
            return prompts
        return OwnSamplingPrompter(
            prompts,
            self.settings,
            model.max_model_len,
            job.model.adapters.keys(),
            vocab_size=model.vocab_size,
        )

    def work(self, item: WorkItem, max_model_len: int) -> OneRequest:
        own = _own_sampling(item.chunk, item.index)
        seed = self._seed(item, own)
        return OneRequest(CompletionAsk(item.chunk.prompt(item.index), seed, own))

    def _seed(self, item: WorkItem, own: OwnSampling | None) -> int | None:
        if (own.sampling if own is not None else self.settings).is_greedy:
            return None
        if own is not None and own.seed is not None:
            return own_seed(own.seed, item.sample)
        if self.settings.seed is None:
            return None
        row = int(item.chunk.rows[item.index])
        return request_seed(self.settings.seed, item.chunk.shard, row, item.sample)

    def num_tokens(self, answer: Answer, num_prompt_tokens: int) -> int:
        return len(Completion.of(answer).token_ids)

    def arrays(self, results: Sequence[Result], detokenize: Detokenize) -> Mapping[str, pa.Array]:
        done = [Completion.of(r.answer) for r in results]
        is_error = np.array([c.error_type is not None for c in done], dtype=np.bool_)
        texts = _texts(done, is_error, detokenize)
        num_prompt_tokens = row_values(results, lambda c: np.diff(c.offsets).astype(np.int32))
        token_logprobs = lists([c.token_logprobs for c in done], np.float32)
        parsed = self._parsed(results, texts, done)
        columns = {
            "completion": pa.array(texts, pa.string()),
            "parsed": pa.array(parsed, pa.string()),
            "finish_reason": pa.array([c.finish_reason for c in done], pa.string()),
            "stop_reason": pa.array([c.stop_reason for c in done], pa.string()),
            "num_prompt_tokens": pa.array(num_prompt_tokens, mask=num_prompt_tokens == 0),
            "num_cached_tokens": ints([c.num_cached_tokens for c in done], is_error),
            "num_completion_tokens": ints([len(c.token_ids) for c in done], is_error),
            "token_ids": lists([None if c.error_type else c.token_ids for c in done], np.int32),
            "token_logprobs": token_logprobs,
            "cumulative_logprob": list_sums(token_logprobs),
        }
        if self.settings.reasoning_parser is not None:
            columns["reasoning"] = pa.array([c.reasoning for c in done], pa.string())
            columns["is_reasoning_cut"] = pa.array(
                [c.is_reasoning_cut for c in done], pa.bool_(), mask=is_error
            )
        if self._has_tops:
            columns["top_token_ids"], columns["top_logprobs"] = top_lists(done)
        if self.settings.prompt_logprobs:
            columns["prompt_token_logprobs"] = lists(
                [c.prompt_token_logprobs for c in done], np.float32
            )
        return columns

    def _parsed(
        self, results: Sequence[Result], texts: Sequence[str | None], done: Sequence[Completion]
    ) -> list[str | None]:
        """Those of `texts` that are documents which fit the schema that they were asked for."""
        documents: dict[int, Documents | None] = {}  # by what holds the schema
        parsed = []
        for result, text, completion in zip(results, texts, done, strict=True):
            own = _own_sampling(result.chunk, result.index)
            sampling = self.settings if own is None else own.sampling
            if id(sampling) not in documents:
                schema = _json_schema(sampling)
                documents[id(sampling)] = None if schema is None else Documents(schema)
            asked = documents[id(sampling)]
            is_cut = completion.finish_reason == "length"
            parsed.append(None if asked is None else asked.fitting(text, is_cut=is_cut))
        return parsed

    def count(self, table: pa.Table) -> Mapping[str, int]:
        num_unparsed, of_reasoning = 0, {}
        if _json_schema(self.settings) is not None:
            num_unparsed = table.column("parsed").null_count - num_failed(table)
        if self.settings.reasoning_parser is not None:
            num_cut = pc.sum(table.column("is_reasoning_cut")).as_py() or 0
            of_reasoning = {"rows_reasoning_cut": num_cut}
        return of_reasoning | {
            "completion_tokens": pc.sum(table.column("num_completion_tokens")).as_py() or 0,
            "rows_cut": pc.sum(pc.equal(table.column("finish_reason"), "length")).as_py() or 0,
            "rows_unparsed": num_unparsed,
            "rows_empty": pc.sum(pc.equal(table.column("completion"), "")).as_py() or 0,
        }

    def remarks(self, num_done: int, counts: Mapping[str, int | None]) -> Iterator[str]:
        num_empty = counts.get("rows_empty") or 0
        if num_empty > num_done // 2:
            yield (
                f"{num_empty} of {num_done} completions of this run are empty: the model ends them "
                "immediately. Look at the prompt (a chat model wants prompt.messages)"
            )
        num_without = counts.get("rows_reasoning_cut") or 0
        if num_without:
            yield (
                f"{num_without} of {num_done} completions ended within their thought "
                "(is_reasoning_cut) and are null: where finish_reason is length, raise "
                "sampling.max_tokens, or end thoughts earlier by sampling.thinking_budget_tokens; "
                "the others were ended by the model or by sampling.stop"
            )
        num_cut, num_unparsed = counts.get("rows_cut"), counts.get("rows_unparsed")
        if self.settings.structured is None or num_cut is None or num_unparsed is None:
            return
        if _json_schema(self.settings) is not None:
            if num_without:  # of which some count as cut, some do not; all are unparsed
                yield from of_answers(num_done, num_unparsed - num_without)
            else:
                yield from of_documents(num_done, num_cut, num_unparsed)
        elif num_cut := max(0, num_cut - num_without):
            kind, _ = self.settings.structured.constraint
            yield (
                f"{num_cut} of {num_done} completions ended at sampling.max_tokens (finish_reason "
                f"length) and may not be whole for sampling.structured.{kind}: raise it"
            )

    @property
    def _has_tops(self) -> bool:
        return bool(self.settings.logprobs) or self.settings.per_row.sets("logprobs")

    @property
    def _has_own_schemas(self) -> bool:
        """Which rows have a schema, and so may be unparsed, is not in the output."""
        return self.settings.per_row.sets("structured")


def _json_schema(sampling: SamplingSettings) -> dict[str, Any] | None:
    structured = sampling.structured
    if structured is None or structured.json_schema is None:
        return None
    _, schema = structured.constraint
    return dict(schema)


def describe(row: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """See `Describe`."""
    tokens = f"{row['num_prompt_tokens']} + {row['num_completion_tokens']} tokens"
    facts = [tokens, row["finish_reason"], *logprob_words(row)]
    if row.get("is_reasoning_cut"):
        facts.append("ended within its thought")
    return row["completion"], facts


def _texts(
    done: list[Completion], is_error: npt.NDArray[np.bool_], detokenize: Detokenize
) -> list[str | None]:
    to_decode = [
        i
        for i, c in enumerate(done)
        if c.text is None and not is_error[i] and not c.is_reasoning_cut
    ]
    lengths = np.array([done[i].num_text_tokens for i in to_decode], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    texts: list[str | None] = [c.text for c in done]
    if to_decode:
        flat = np.concatenate([done[i].token_ids[: done[i].num_text_tokens] for i in to_decode])
        for i, text in zip(to_decode, detokenize(flat, offsets), strict=True):
            texts[i] = text
    return texts


KIND = TaskKind(
    lambda job: Generate(job.sampling, job.prompt.chat_template_kwargs),
    COLUMNS,
    COUNTS,
    describe,
    some_counts=_REASONING_COUNTS,
    repeating=("finish_reason", "stop_reason"),
)


def _own_sampling(chunk: Chunk, index: int) -> OwnSampling | None:
    """How row `index` is sampled, where rows have settings of their own."""
    own = chunk.own_of(index)
    assert own is None or isinstance(own, OwnSampling)
    return own
