"""How a token is chosen from its logits: greedily here, else by llama.cpp's own samplers.

In vLLM's order: penalties, the grammar, temperature, min_p, top_k, top_p. Must not know: batches,
requests.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any

from batchinfer.config import SamplingSettings
from batchinfer.errors import ConfigError
from batchinfer.llama_cpp.guidance import guidance_sampler, why_unreadable
from batchinfer.llama_cpp.library import SamplerChainParams, last_errors, library

#: Kinds of `sampling.structured` that LLGuidance reads -> its word; llama.cpp reads the others.
GUIDANCE = {"json_schema": "json", "regex": "regex"}
#: llama.cpp's word for "another seed each time".
_RANDOM_SEED = 0xFFFFFFFF
#: That are kept, where rows have their own.
_MAX_CONSTRAINTS = 256
_SEED_MIX = 0x9E3779B97F4A7C15


class Samplers:
    """Makes the chains of one job's requests. Raises ConfigError for a grammar that is none.

    Each constraint is read once, and requests take copies.
    """

    def __init__(
        self, file: str, vocab: Any, max_model_len: int, sampling: SamplingSettings
    ) -> None:
        """`vocab`: llama.cpp's, of the loaded model of `file`."""
        self._lib, self._vocab, self._file = library(), vocab, file
        self._vocab_size = int(self._lib.llama_vocab_n_tokens(vocab))
        self._max_model_len = max_model_len
        self._constraints: dict[str, Any] = {}
        self._unreadable: dict[str, str] = {}  # why; trying one costs 0.3 s
        self.check(sampling)

    def check(self, sampling: SamplingSettings) -> None:
        """Read what it constrains completions by. Raises ConfigError for what is none."""
        if sampling.structured is not None:
            self._constraint_of(*sampling.structured.constraint)

    def chain(self, sampling: SamplingSettings, prompt: Iterable[int], seed: int | None) -> Any:
        """The chain of a request; `free` it. It takes in the tokens that it samples itself."""
        lib, s = self._lib, sampling
        chain = lib.llama_sampler_chain_init(SamplerChainParams(True))
        for sampler in self._penalties(s, prompt):
            lib.llama_sampler_chain_add(chain, sampler)
        if s.structured is not None:
            constraint = self._constraint_of(*s.structured.constraint)
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_clone(constraint))
        if s.is_greedy:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            return chain
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(s.temperature))
        if s.min_p > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(s.min_p, 1))
        if s.top_k > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(s.top_k))
        if s.top_p < 1:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(s.top_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(_seed32(seed)))
        return chain

    def free(self, chain: Any) -> None:
        self._lib.llama_sampler_free(chain)

    def close(self) -> None:
        self._unreadable.clear()
        while self._constraints:
            self._lib.llama_sampler_free(self._constraints.popitem()[1])

    def _constraint_of(self, kind: str, value: Any) -> Any:
        """The sampler of a constraint."""
        key = json.dumps([kind, value])
        if (why := self._unreadable.get(key)) is not None:
            raise ConfigError(why)
        if key not in self._constraints:
            if len(self._constraints) + len(self._unreadable) >= _MAX_CONSTRAINTS:
                self.close()
            try:
                self._constraints[key] = self._read(kind, value)
            except ConfigError as error:
                self._unreadable[key] = str(error)
                raise
        return self._constraints[key]

    def _read(self, kind: str, value: Any) -> Any:
        if kind in GUIDANCE:
            text = value if isinstance(value, str) else json.dumps(value)
            if why := why_unreadable(self._file, GUIDANCE[kind], text):
                raise unreadable(kind, value, why)
            return guidance_sampler(self._vocab, GUIDANCE[kind], text)
        grammar = str(value) if kind == "grammar" else one_of(value)
        last_errors.clear()
        found = self._lib.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        if not found:
            raise unreadable(kind, value, last_errors[-1] if last_errors else "it gives no reason")
        return found

    def _penalties(self, s: SamplingSettings, prompt: Iterable[int]) -> Iterable[Any]:
        """Repetition is of prompt and completion, presence and frequency of the completion."""
        lib, last = self._lib, self._max_model_len
        if s.repetition_penalty != 1.0:
            repetition = lib.llama_sampler_init_penalties(
                self._vocab_size, last, s.repetition_penalty, 0.0, 0.0
            )
            for token_id in prompt:
                lib.llama_sampler_accept(repetition, token_id)
            yield repetition
        if (s.presence_penalty, s.frequency_penalty) != (0.0, 0.0):
            yield lib.llama_sampler_init_penalties(
                self._vocab_size, last, 1.0, s.frequency_penalty, s.presence_penalty
            )


def is_plain(sampling: SamplingSettings) -> bool:
    """Whether the likeliest token is always taken: no chain is needed."""
    s = sampling
    penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    return s.is_greedy and s.structured is None and penalties == (1.0, 0.0, 0.0)


def _seed32(seed: int | None) -> int:
    """All 64 bits of a seed in the 32 that llama.cpp takes; without one a random one."""
    if seed is None:
        return secrets.randbelow(_RANDOM_SEED)
    mixed = (seed * _SEED_MIX) & 0xFFFFFFFFFFFFFFFF
    return (mixed >> 32) % _RANDOM_SEED


def one_of(texts: Iterable[str]) -> str:
    """A grammar of these texts, which it spells as JSON does."""
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def unreadable(kind: str, value: Any, why: str) -> ConfigError:
    """`value` is a constraint that llama.cpp cannot read, and `why`."""
    return ConfigError(
        f"llama.cpp cannot read sampling.structured.{kind}, {str(value)[:200]}: {why}"
    )
