"""The fake's completions: made of the prompt's token ids and the seed."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.config import SamplingSettings
from batchinfer.engine.base import Request, Timing
from batchinfer.engine.demands.completion import Completion, CompletionDemand, CompletionRequest
from batchinfer.testing.engine import FakePlan

VOCAB_SIZE = 4096
EOS_TOKEN_ID = 2


class FakeCompletions:
    """See `Answers`. A completion has a token for each step."""

    def __init__(self, demand: CompletionDemand, plan: FakePlan) -> None:
        self._plan = plan
        self._sampling = demand.sampling
        self._has_reasoning = demand.sampling.reasoning_parser is not None
        self._has_prompt_logprobs = demand.sampling.prompt_logprobs

    def num_steps(self, request: Request) -> int:
        return 1 + _hash(request) % self._of(request).max_tokens

    def _of(self, request: Request) -> SamplingSettings:
        assert isinstance(request, CompletionRequest)
        return request.sampling or self._sampling

    def answer(self, request: Request, num_steps: int) -> Completion:
        whole = self._whole(request)
        if num_steps == self.num_steps(request):
            return whole
        logprobs = whole.token_logprobs
        return Completion(
            request.key,
            token_ids=whole.token_ids[:num_steps],
            num_text_tokens=num_steps,
            token_logprobs=None if logprobs is None else logprobs[:num_steps],
        )

    def _whole(self, request: Request) -> Completion:
        assert isinstance(request, CompletionRequest)
        seed = _hash(request)
        sampling = self._of(request)
        length = 1 + seed % sampling.max_tokens
        token_ids = ((np.arange(length, dtype=np.int64) * 7919 + seed) % 4000 + 10).astype(np.int32)
        is_stop = length < sampling.max_tokens
        if is_stop:
            token_ids[-1] = EOS_TOKEN_ID
        fields: dict[str, Any] = {}
        if request.next_token is not None:
            token_ids = np.array([request.next_token], np.int32)
            whole = np.concatenate([request.token_ids, token_ids])
            fields["token_logprobs"] = prompt_logprobs(whole)[-1:]
        elif sampling.logprobs is not None:
            fields["token_logprobs"] = (-(token_ids % 100) / 100).astype(np.float32)
        if k := sampling.logprobs:
            fields["top_offsets"] = np.arange(0, length * k + 1, k, dtype=np.int32)
            fields["top_token_ids"] = np.repeat(token_ids, k)
            fields["top_logprobs"] = np.repeat(fields["token_logprobs"], k)
        if self._has_prompt_logprobs:
            fields["prompt_token_logprobs"] = prompt_logprobs(request.token_ids)
            if k:
                tops = prompt_tops(request.token_ids, k)
                fields["prompt_top_token_ids"], fields["prompt_top_logprobs"] = tops
        if self._has_reasoning and self._plan.thought is not None:
            fields["reasoning"], fields["is_reasoning_cut"] = self._plan.thought, not is_stop
        is_cut = fields.get("is_reasoning_cut", False)
        return Completion(
            key=request.key,
            token_ids=token_ids,
            num_text_tokens=length - is_stop,
            text=None if is_cut else self._plan.text,
            finish_reason="stop" if is_stop else "length",
            timing=Timing(0.0, 0.001, 0.002, 0.003),
            **fields,
        )


def prompt_logprobs(token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """A logprob for each token, from it and all tokens before it; NaN for the first."""
    crc, values = 0, []
    for token_id in token_ids.tolist():
        crc = zlib.crc32(token_id.to_bytes(4, "little"), crc)
        values.append(-(crc % 4096) / 512)
    return np.array([np.nan, *values[1:]], np.float32)


def prompt_tops(
    token_ids: npt.NDArray[np.int32], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """For each token k made-up likeliest ones that depend on it, of 1/2, 1/4, ... [n, k]"""
    ids = (token_ids[:, None] + np.arange(k, dtype=np.int32)) % VOCAB_SIZE
    ids[0] = -1
    logprobs = np.tile(-np.log(2) * np.arange(1, k + 1), (len(token_ids), 1)).astype(np.float32)
    logprobs[0] = np.nan
    return ids.astype(np.int32), logprobs


def _hash(request: Request) -> int:
    assert isinstance(request, CompletionRequest)
    crc = zlib.crc32(request.token_ids.tobytes())
    return crc if request.seed is None else zlib.crc32(request.seed.to_bytes(8, "little"), crc)


ANSWERS = FakeCompletions
