"""A deterministic engine without a model, never reachable from the program.

A completion depends on the prompt's token ids and the seed alone, so a resumed run must equal an
uninterrupted one. Faults are asked for by `FakePlan`.
"""

from __future__ import annotations

import heapq
import logging
import os
import signal
import time
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.engine.base import Completion, EngineFacts, Request, Timing
from batchinfer.errors import EngineDied, RowError

VOCAB_SIZE = 4096
EOS_TOKEN_ID = 2


@dataclass(frozen=True, slots=True)
class FakePlan:
    """How the fake behaves."""

    max_num_seqs: int = 64
    step_s: float = 0.0  # sleep in each step
    build_s: float = 0.0  # sleep while "loading"
    die_at_step: int | None = None  # raise EngineDied
    kill_at_step: int | None = None  # SIGKILL our own process
    hang_at_step: int | None = None  # sleep for an hour in a step
    reject_every: int = 0  # refuse every n-th request
    fail_build: str | None = None  # raise ConfigError with this message
    warn: str | None = None  # warn of this while "loading"
    text: str | None = None  # of every completion
    log_file: str | None = None  # append one line a request: the crc of its prompt


class FakeEngine:
    """See `Engine` for the contract."""

    def __init__(
        self,
        plan: FakePlan,
        *,
        max_tokens: int,
        num_logprobs: int | None,
        max_model_len: int,
        has_prompt_logprobs: bool = False,
    ) -> None:
        if plan.warn:
            logging.getLogger("batchinfer.fake").warning("%s", plan.warn)
        time.sleep(plan.build_s)
        self._plan = plan
        self._max_tokens = max_tokens
        self._num_logprobs = num_logprobs
        self._has_prompt_logprobs = has_prompt_logprobs
        self._waiting: deque[Request] = deque()
        self._running: list[tuple[int, int, Request]] = []  # (last step, key, request)
        self._step = 0
        self._num_running = 0
        self.num_added = 0
        self.is_closed = False
        self.facts = EngineFacts(
            name="fake",
            version="0",
            device="none",
            dtype="float32",
            quantization="none",
            max_model_len=max_model_len,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=8192,
            kv_cache_tokens=None,
        )

    def num_tokens_in_flight(self) -> int:
        begun = (end - _hash(request) % self._max_tokens for end, _, request in self._running)
        return sum(max(0, 1 + self._step - first) for first in begun)

    @property
    def num_running(self) -> int:
        return self._num_running

    def add(self, request: Request) -> None:
        self.num_added += 1
        if self._plan.log_file:
            with open(self._plan.log_file, "a") as log:  # noqa: PTH123
                log.write(f"{zlib.crc32(request.token_ids.tobytes())}\n")
        if self._plan.reject_every and self.num_added % self._plan.reject_every == 0:
            raise RowError("engine_rejected", "the fake engine refuses this request")
        self._waiting.append(request)

    def step(self) -> list[Completion]:
        self._step += 1
        if self._step == self._plan.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._step == self._plan.die_at_step:
            raise EngineDied("the fake engine died as it was told to")
        if self._step == self._plan.hang_at_step:
            time.sleep(3600)
        if self._plan.step_s:
            time.sleep(self._plan.step_s)
        while self._waiting and len(self._running) < self._plan.max_num_seqs:
            request = self._waiting.popleft()
            length = 1 + _hash(request) % self._max_tokens
            heapq.heappush(self._running, (self._step + length - 1, request.key, request))
        self._num_running = len(self._running)
        done = []
        while self._running and self._running[0][0] <= self._step:
            done.append(self._complete(heapq.heappop(self._running)[2]))
        return done

    def so_far(self, key: int) -> Completion:
        running = {other: (end, request) for end, other, request in self._running}
        if key not in running:
            return Completion(key)
        end, request = running[key]
        whole = self._complete(request)
        num_tokens = len(whole.token_ids) - max(0, end - self._step)
        logprobs = whole.token_logprobs
        return Completion(
            key,
            token_ids=whole.token_ids[:num_tokens],
            num_text_tokens=num_tokens,
            token_logprobs=None if logprobs is None else logprobs[:num_tokens],
        )

    def abort(self, key: int) -> None:
        self._running = [entry for entry in self._running if entry[1] != key]
        heapq.heapify(self._running)
        self._waiting = deque(request for request in self._waiting if request.key != key)

    def close(self) -> None:
        self.is_closed = True

    def _complete(self, request: Request) -> Completion:
        seed = _hash(request)
        length = 1 + seed % self._max_tokens
        token_ids = ((np.arange(length, dtype=np.int64) * 7919 + seed) % 4000 + 10).astype(np.int32)
        is_stop = length < self._max_tokens
        if is_stop:
            token_ids[-1] = EOS_TOKEN_ID
        fields: dict[str, Any] = {}
        if request.next_token is not None:
            token_ids = np.array([request.next_token], np.int32)
            whole = np.concatenate([request.token_ids, token_ids])
            fields["token_logprobs"] = prompt_logprobs(whole)[-1:]
        elif self._num_logprobs is not None:
            fields["token_logprobs"] = (-(token_ids % 100) / 100).astype(np.float32)
        if self._num_logprobs:
            k = self._num_logprobs
            fields["top_offsets"] = np.arange(0, length * k + 1, k, dtype=np.int32)
            fields["top_token_ids"] = np.repeat(token_ids, k)
            fields["top_logprobs"] = np.repeat(fields["token_logprobs"], k)
        if self._has_prompt_logprobs:
            fields["prompt_token_logprobs"] = prompt_logprobs(request.token_ids)
            if self._num_logprobs:
                tops = prompt_tops(request.token_ids, self._num_logprobs)
                fields["prompt_top_token_ids"], fields["prompt_top_logprobs"] = tops
        return Completion(
            key=request.key,
            token_ids=token_ids,
            num_text_tokens=length - is_stop,
            text=self._plan.text,
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
    return (
        zlib.crc32(request.token_ids.tobytes(), request.seed or 0)
        if request.seed is None
        else (
            zlib.crc32(request.seed.to_bytes(8, "little"), zlib.crc32(request.token_ids.tobytes()))
        )
    )
