"""A row on its way through the engine in windows: what is asked, and how answers become its scores.

Must not know: files, settings, how an engine works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.engine.base import Answer, Int32Array, Timing
from batchinfer.engine.demands.completion import Completion, CompletionRequest
from batchinfer.errors import RowError
from batchinfer.tasks.base import Ask

#: A logprob is at most 0, but for the rounding of float32 logits.
MAX_LOGPROB = 1e-3
_TIMES = ("queued_s", "prefill_s", "decode_s", "total_s")


@dataclass(frozen=True, slots=True)
class WindowAsk(Ask):
    """A window. `start`: the position of its first token in the row."""

    next_token: int | None = None
    start: int = 0

    def request(self, key: int) -> CompletionRequest:
        return CompletionRequest(key, self.token_ids, next_token=self.next_token)


class ScoringWindows:
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
        "_top_logprobs",
        "_top_token_ids",
    )

    def __init__(
        self,
        token_ids: Int32Array,
        num_given: int,
        *,
        context: int,
        stride: int,
        max_prompt_tokens: int,
        num_top: int = 0,
    ) -> None:
        self._max_prompt_tokens = max_prompt_tokens
        self._token_ids = token_ids
        self._num_given = num_given
        self._context = context
        self._stride = stride
        self._logprobs = np.full(len(token_ids), np.nan, np.float32)
        self._top_token_ids = np.full((len(token_ids), num_top), -1, np.int32)
        self._top_logprobs = np.full((len(token_ids), num_top), np.nan, np.float32)
        self._times: dict[str, float] = {}

    def asks(self) -> Iterator[WindowAsk]:
        num_tokens = len(self._token_ids)
        start, stop = 0, 0
        while stop < num_tokens:
            stop = min(start + self._context, num_tokens)
            if stop > self._first_scored(start):
                yield self._ask(start, stop)
            start += self._stride

    def _ask(self, start: int, stop: int) -> WindowAsk:
        window = self._token_ids[start:stop]
        if len(window) <= self._max_prompt_tokens:
            return WindowAsk(window, start=start)
        return WindowAsk(window[:-1], next_token=int(window[-1]), start=start)

    def _first_scored(self, start: int) -> int:
        """Position of the first token that the window from `start` on scores."""
        before = start - self._stride + self._context if start else 0
        return max(before, self._num_given, 1)

    def add(self, ask: Ask, answer: Answer) -> None:
        assert isinstance(ask, WindowAsk)
        completion = Completion.of(answer)
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
        is_bad = ~(np.isfinite(scored) & (scored <= MAX_LOGPROB))
        if is_bad.any():
            bad = int(np.flatnonzero(is_bad)[0])
            raise RowError(
                "engine_error", f"the logprob of token {first + bad} of the row is {scored[bad]}"
            )
        self._logprobs[first : first + len(scored)] = scored
        self._add_top(ask, completion, first)
        for name in _TIMES:
            if (seconds := getattr(completion.timing, name)) is not None:
                self._times[name] = self._times.get(name, 0.0) + seconds

    def _add_top(self, ask: WindowAsk, completion: Completion, first: int) -> None:
        num_top = self._top_token_ids.shape[1]
        if not num_top:
            return
        self._top_token_ids[first : ask.start + len(ask.token_ids)] = _rows(
            completion.prompt_top_token_ids, ask, first
        )
        self._top_logprobs[first : ask.start + len(ask.token_ids)] = _rows(
            completion.prompt_top_logprobs, ask, first
        )
        if ask.next_token is not None:
            last = ask.start + len(ask.token_ids)
            self._top_token_ids[last] = _of_last(completion.top_token_ids, num_top)
            self._top_logprobs[last] = _of_last(completion.top_logprobs, num_top)

    def answer(self) -> Completion:
        """Its tokens are those of the scored text; a logprob is NaN where there is none."""
        completion = Completion(
            key=-1,
            token_ids=self._token_ids[self._num_given :].copy(),  # a view would hold the whole row
            token_logprobs=self._logprobs[self._num_given :].copy(),
            timing=Timing(**self._times),
        )
        if self._top_token_ids.shape[1]:
            token_ids = self._top_token_ids[self._num_given :]
            is_entry = token_ids >= 0
            completion.top_offsets = np.zeros(len(token_ids) + 1, np.int32)
            np.cumsum(is_entry.sum(axis=1), out=completion.top_offsets[1:])
            completion.top_token_ids = token_ids[is_entry]
            completion.top_logprobs = self._top_logprobs[self._num_given :][is_entry]
        return completion


def _rows(values: npt.NDArray[Any] | None, ask: WindowAsk, first: int) -> npt.NDArray[Any]:
    """The values at the window's tokens from position `first` of the row on. [n, k]"""
    if values is None:
        if first - ask.start < len(ask.token_ids):
            raise RowError("engine_error", "the engine did not give the likeliest tokens")
        return np.empty((0, 1))
    return values[first - ask.start :]


def _of_last(values: npt.NDArray[Any] | None, num_top: int) -> npt.NDArray[Any]:
    """The values of a completion of one token. [k]"""
    if values is None or len(values) != num_top:
        raise RowError("engine_error", "the engine did not give the likeliest tokens")
    return values
