"""llama.cpp as an Engine: sequences in slots of one context, driven a step at a time.

Each step computes one token of every sequence that has its prompt, and with what room is left the
prompts of others, in the order in which they came. A sequence is let in only if its prompt and its
longest completion have room in the KV cache, so none has to be stopped for lack of it. Must not
know: files, checkpoints, what a key means.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.config import SamplingSettings
from batchinfer.engine.base import Answer, Demand, EngineFacts, EngineSpec, Request, Timing
from batchinfer.engine.demands.completion import Completion, CompletionRequest
from batchinfer.engine.llama_cpp.batch import StepBatch
from batchinfer.engine.llama_cpp.demands.completion import check_together
from batchinfer.engine.llama_cpp.logprobs import Positions
from batchinfer.engine.llama_cpp.requests import requests_of
from batchinfer.engine.llama_cpp.sampling import Samplers, is_plain
from batchinfer.engine.llama_cpp.sizes import Sizes
from batchinfer.engine.regexes import unreadable
from batchinfer.errors import ConfigError, EngineDied, RowError
from batchinfer.llama_cpp.library import library
from batchinfer.llama_cpp.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_clock = time.monotonic


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request on its way. `num_computed`: prompt tokens whose keys and values are cached."""

    request: CompletionRequest
    sampling: SamplingSettings
    slot: int
    added_s: float
    scheduled_s: float
    chain: Any
    num_computed: int = 0
    first_token_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    of_tokens: Positions = field(default_factory=Positions)
    of_prompt: Positions = field(default_factory=Positions)

    @property
    def prompt(self) -> npt.NDArray[np.int32]:
        return self.request.token_ids

    @property
    def has_prompt(self) -> bool:
        return self.num_computed == len(self.prompt)


class LlamaCppEngine:
    """A loaded model. See `Engine` for the contract; one thread calls it."""

    def __init__(
        self,
        spec: EngineSpec,
        sizes: Sizes,
        facts: EngineFacts,
        vocabulary: Vocabulary,
        handles: tuple[Any, Any],
    ) -> None:
        self._lib = library()
        self._model, self._context = handles
        self._memory = self._lib.llama_get_memory(self._context)
        self._requests = requests_of(spec.demand)
        self._sampling = self._requests.sampling
        log.debug("parameters of every request: %s", self._sampling.model_dump(exclude_unset=True))
        self._sizes, self._max_model_len = sizes, spec.model.max_model_len
        self._vocabulary = vocabulary
        self._ends = self._vocabulary.ends | frozenset(spec.model.eos_token_ids)
        self._samplers = Samplers(
            spec.model.path,
            self._lib.llama_model_get_vocab(self._model),
            self._max_model_len,
            self._sampling,
        )
        self._batch = StepBatch(sizes.max_num_batched_tokens)
        self._waiting: deque[tuple[CompletionRequest, float]] = deque()
        self._running: list[_Sequence] = []
        self._slots = list(range(sizes.max_num_seqs))[::-1]
        self._num_running = 0
        self.facts = facts

    @property
    def num_running(self) -> int:
        return self._num_running

    def num_tokens_in_flight(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self._running)

    def add(self, request: Request) -> None:
        if self._context is None:
            raise EngineDied("the engine llama_cpp is closed")
        assert isinstance(request, CompletionRequest)
        num_tokens = len(request.token_ids)
        if num_tokens == 0 or num_tokens >= self._max_model_len:
            raise RowError(
                "engine_rejected",
                f"{num_tokens} prompt tokens: from 1 to {self._max_model_len - 1} are taken",
            )
        least, most = int(request.token_ids.min()), int(request.token_ids.max())
        if least < 0 or most >= self._vocabulary.size:
            raise RowError(
                "engine_rejected",
                f"token id {most if least >= 0 else least} is not in the model's vocabulary of "
                f"{self._vocabulary.size}",
            )
        if request.sampling is not None:
            try:
                check_together(request.sampling)
                if why := unreadable(request.sampling.structured):
                    raise ConfigError(why)
                self._samplers.check(request.sampling)
            except ConfigError as error:
                raise RowError("engine_rejected", str(error)) from None
        self._waiting.append((request, _clock()))

    def step(self) -> list[Answer]:
        if self._context is None:
            raise EngineDied("the engine llama_cpp is closed")
        self._admit()
        self._num_running = len(self._running)
        if not self._running:
            return []
        planned = self._plan()
        if code := self._lib.llama_decode(self._context, self._batch.as_argument()):
            raise EngineDied(f"llama.cpp failed within a step (llama_decode: {code})")
        logits = self._batch.logits_of(self._lib, self._context, self._vocabulary.size)
        finished: list[Answer] = []
        for sequence, position, num_rows in planned:
            rows = logits[position : position + num_rows]
            if (completion := self._advance(sequence, rows)) is not None:
                finished.append(completion)
        return finished

    def so_far(self, key: int) -> Answer | None:
        sequence = next((s for s in self._running if s.request.key == key), None)
        return self._partial(sequence) if sequence is not None and sequence.token_ids else None

    def abort(self, key: int) -> None:
        self._waiting = deque(w for w in self._waiting if w[0].key != key)
        for sequence in [s for s in self._running if s.request.key == key]:
            self._running.remove(sequence)
            self._release(sequence)

    def set_demand(self, demand: Demand) -> None:
        """`prompt_logprobs` stays as it is: the room for them is that of the engine."""
        requests = requests_of(demand)
        requests.check()
        self._samplers.check(requests.sampling)
        self._requests, self._sampling = requests, requests.sampling

    def close(self) -> None:
        context, self._context = self._context, None
        if context is None:
            return
        for sequence in self._running:
            self._release(sequence)
        self._running.clear()
        self._waiting.clear()
        self._samplers.close()
        self._lib.llama_free(context)
        self._lib.llama_model_free(self._model)

    def _admit(self) -> None:
        """Let in those that came first, while there are slots and room for all their tokens."""
        room = self._sizes.kv_tokens - sum(self._most_tokens(s.request) for s in self._running)
        while self._waiting and self._slots:
            request, added_s = self._waiting[0]
            if self._sizes.is_shared and (room := room - self._most_tokens(request)) < 0:
                return
            self._waiting.popleft()
            sampling, chain = self._sampling_of(request), None
            if not is_plain(sampling) and request.next_token is None:
                chain = self._samplers.chain(sampling, request.token_ids.tolist(), request.seed)
            slot = self._slots.pop()
            self._running.append(_Sequence(request, sampling, slot, added_s, _clock(), chain))

    def _sampling_of(self, request: CompletionRequest) -> SamplingSettings:
        return request.sampling or self._sampling

    def _most_tokens(self, request: CompletionRequest) -> int:
        most = len(request.token_ids) + self._sampling_of(request).max_tokens
        return min(most, self._max_model_len)

    def _plan(self) -> list[tuple[_Sequence, int, int]]:
        """Fill the batch. -> (sequence, its first row of logits, how many it has)"""
        batch, planned = self._batch, []
        batch.clear()
        for sequence in self._running:
            if sequence.has_prompt:
                position = len(sequence.prompt) + len(sequence.token_ids) - 1
                first = batch.add([sequence.token_ids[-1]], position, sequence.slot, num_outputs=1)
                planned.append((sequence, first, 1))
        for sequence in self._running:
            if not sequence.has_prompt and batch.room:
                start = sequence.num_computed
                tokens = sequence.prompt[start : start + batch.room]
                sequence.num_computed += len(tokens)
                num_outputs = int(sequence.has_prompt)
                if self._sampling.prompt_logprobs:
                    num_outputs = len(tokens)
                first = batch.add(tokens, start, sequence.slot, num_outputs=num_outputs)
                planned.append((sequence, first, num_outputs))
        return planned

    def _advance(self, sequence: _Sequence, logits: npt.NDArray[np.float32]) -> Completion | None:
        """Take in a step's rows of logits of a sequence: [rows, vocabulary]"""
        if self._sampling.prompt_logprobs and not sequence.token_ids:
            self._take_prompt(sequence, logits)
        if not sequence.has_prompt:
            return None
        now = _clock()
        token_id = self._choose(sequence, logits[-1])
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        sampling = sequence.sampling
        if sampling.logprobs is not None or sequence.request.next_token is not None:
            num_top = sampling.logprobs or 0
            sequence.of_tokens.add(logits[-1:], np.array([token_id]), num_top)
        sequence.token_ids.append(token_id)
        ended = self._end_of(sequence, token_id)
        if ended is None:
            return None
        self._running.remove(sequence)
        self._release(sequence)
        return self._completion(sequence, now, *ended)

    def _take_prompt(self, sequence: _Sequence, logits: npt.NDArray[np.float32]) -> None:
        """Of each row the logprob of the token that follows; the prompt's last row has none."""
        stop = sequence.num_computed
        start = stop - len(logits)
        following = sequence.prompt[start + 1 : stop + 1]
        rows = logits[: len(following)]
        sequence.of_prompt.add(rows, following, self._requests.num_prompt_tops)

    def _choose(self, sequence: _Sequence, logits: npt.NDArray[np.float32]) -> int:
        if sequence.request.next_token is not None:
            return sequence.request.next_token
        if sequence.chain is None:
            return int(logits.argmax())
        index = self._batch.last_index_of(sequence.slot)
        return int(self._lib.llama_sampler_sample(sequence.chain, self._context, index))

    def _end_of(self, sequence: _Sequence, token_id: int) -> tuple[str, str | None, int] | None:
        """(finish reason, stop reason, tokens that belong to the text), None: it goes on."""
        num_tokens, sampling = len(sequence.token_ids), sequence.sampling
        if token_id in self._ends and not sampling.ignore_eos:
            return "stop", None, num_tokens - 1
        if token_id in sampling.stop_token_ids:
            return "stop", str(token_id), num_tokens - 1
        if sampling.stop:
            sequence.text += self._vocabulary.pieces[token_id]
            if (stop := self._stop_in(sequence, token_id)) is not None:
                return "stop", stop, num_tokens
        if num_tokens >= sampling.max_tokens:
            return "length", None, num_tokens
        if len(sequence.prompt) + num_tokens >= self._max_model_len:
            return "length", None, num_tokens
        return None

    def _stop_in(self, sequence: _Sequence, token_id: int) -> str | None:
        """The stop text that the last token completed, with which the text is cut before it."""
        text, of_last = sequence.text, len(self._vocabulary.pieces[token_id])
        places = [
            (place, stop)
            for stop in map(str.encode, sequence.sampling.stop)
            if (place := text.find(stop, max(0, len(text) - of_last - len(stop) + 1))) >= 0
        ]
        if not places:
            return None
        place, stop = min(places, key=lambda found: found[0])
        del text[place:]
        return stop.decode()

    def _completion(
        self, sequence: _Sequence, now: float, reason: str, stop: str | None, num_text_tokens: int
    ) -> Completion:
        assert sequence.first_token_s is not None
        found = self._partial(sequence)
        found.num_text_tokens = num_text_tokens
        found.finish_reason, found.stop_reason = reason, stop
        found.timing = Timing(
            queued_s=sequence.scheduled_s - sequence.added_s,
            prefill_s=sequence.first_token_s - sequence.scheduled_s,
            decode_s=now - sequence.first_token_s,
            total_s=now - sequence.added_s,
        )
        if self._sampling.prompt_logprobs:
            found.prompt_token_logprobs = sequence.of_prompt.logprobs(has_first=False)
            if num_tops := self._requests.num_prompt_tops:
                tops = sequence.of_prompt.tops(num_tops)
                found.prompt_top_token_ids, found.prompt_top_logprobs = tops
        return found

    def _partial(self, sequence: _Sequence) -> Completion:
        """The tokens so far, with what is known of them."""
        found = Completion(
            key=sequence.request.key,
            token_ids=np.array(sequence.token_ids, np.int32),
            num_text_tokens=len(sequence.token_ids),
            text=sequence.text.decode("utf-8", "replace") if sequence.sampling.stop else None,
        )
        if sequence.of_tokens:
            found.token_logprobs = sequence.of_tokens.logprobs()
            if sequence.sampling.logprobs:
                found.top_offsets, found.top_token_ids, found.top_logprobs = (
                    sequence.of_tokens.flat_tops()
                )
        return found

    def _release(self, sequence: _Sequence) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
        self._slots.append(sequence.slot)
        if sequence.chain is not None:
            self._samplers.free(sequence.chain)
            sequence.chain = None
