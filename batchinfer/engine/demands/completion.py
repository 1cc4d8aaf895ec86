"""Completions: an engine continues a prompt with tokens that it samples.

Must not know: tasks, engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from batchinfer.config import SamplingSettings
from batchinfer.engine.base import Answer, Demand, Float32Array, Int32Array, Request


@dataclass(frozen=True, slots=True)
class CompletionDemand(Demand):
    """How tokens are sampled; prompts' logprobs too if `sampling.prompt_logprobs`.

    With `sampling.per_row` requests may bring their own sampling, which differs in these settings
    alone.
    """

    wants: ClassVar[str] = "completion"

    sampling: SamplingSettings  # the task's, not always the job's
    #: What the chat template was told, which may be whether the model thinks at all.
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def prompt_logprobs_key(self) -> str:
        """For messages: what in the job file asks for the logprobs of prompts."""
        return "sampling.prompt_logprobs"


@dataclass(frozen=True, slots=True)
class CompletionRequest(Request):
    """A prompt to be continued."""

    seed: int | None = None  # None: the engine's own random state (or greedy)
    next_token: int | None = None  # the one token to be generated; None: what sampling chooses
    is_streamed: bool = False  # `StreamingEngine.so_far` is asked for it
    sampling: SamplingSettings | None = None  # the request's own; None: the demand's
    lora: str | None = None  # one of `model.adapters`; None: the job's own adapter, if it has one

    def __str__(self) -> str:
        words = [f"{len(self.token_ids)} prompt tokens, seed {self.seed}"]
        if self.next_token is not None:
            words.append(f"next token {self.next_token}")
        if self.lora is not None:
            words.append(f"adapter {self.lora}")
        if self.sampling is not None:
            own = self.sampling.model_dump(mode="json", exclude_defaults=True, exclude={"n"})
            words.append(f"sampled by {json.dumps(own, ensure_ascii=False)}")
        return ", ".join(words)


@dataclass(slots=True, eq=False)
class Completion(Answer):
    """Generated tokens; none with an error. One that is not whole has no `finish_reason`.

    `text` is None unless the engine had to detokenize (stop strings); the sink detokenizes in bulk.
    `num_text_tokens` is how many of `token_ids` belong to the text (a stop token at the end does
    not).
    With `sampling.reasoning_parser` the text of one that is whole is the answer alone, and
    `reasoning` what came before it. None of both: there was no thought, or the answer never began
    (`is_reasoning_cut`).
    Top lists are flat: the k entries of position i are at [top_offsets[i], top_offsets[i + 1]).
    `finish_reason`: "stop" or "length". `stop_reason`: None for EOS and length, else the stop
    string or the stop token's id in decimal.
    """

    # [num_completion_tokens]
    token_ids: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    num_text_tokens: int = 0
    text: str | None = None
    reasoning: str | None = None
    is_reasoning_cut: bool = False  # it ended within its thought: it has no text
    finish_reason: str | None = None
    stop_reason: str | None = None
    num_cached_tokens: int = 0
    token_logprobs: Float32Array | None = None  # [num_completion_tokens], natural log
    top_offsets: Int32Array | None = None  # [num_completion_tokens + 1]
    top_token_ids: Int32Array | None = None  # [top_offsets[-1]]
    top_logprobs: Float32Array | None = None  # [top_offsets[-1]]
    prompt_token_logprobs: Float32Array | None = None  # [num_prompt_tokens], NaN for the first
    # The likeliest k tokens at each position, best first; NaN for the first.
    prompt_top_token_ids: Int32Array | None = None  # [num_prompt_tokens, k]
    prompt_top_logprobs: Float32Array | None = None  # [num_prompt_tokens, k]

    @property
    def is_split(self) -> bool:
        """Whether its tokens are more than its text: a thought, too."""
        return self.reasoning is not None or self.is_reasoning_cut

    def tokens(self) -> tuple[int, int]:
        return self.num_cached_tokens, len(self.token_ids)

    @classmethod
    def of(cls, answer: Answer) -> Completion:
        """The answer to a request for a completion: an error has no tokens."""
        if isinstance(answer, Completion):
            return answer
        assert answer.error_type is not None
        return cls(
            answer.key,
            timing=answer.timing,
            error_type=answer.error_type,
            error_message=answer.error_message,
        )
