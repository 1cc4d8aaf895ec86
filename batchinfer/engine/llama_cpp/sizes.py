"""How many sequences run at a time, and the memory that they and the model take.

Must not know: the library, requests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from batchinfer.engine.base import EngineSpec
from batchinfer.engine.hardware import gib
from batchinfer.engine.host import available_memory_bytes, total_memory_bytes
from batchinfer.engine.llama_cpp.requests import requests_of

#: More sequences gain little on a CPU, and each has a KV cache of its own.
_NUM_SEQS = 32
_NUM_BATCHED_TOKENS = 512
#: Tokens that llama.cpp computes together, of those of a step.
MAX_UBATCH = 512
#: Of logits that one step computes, where every prompt token has some.
_LOGITS_BYTES = 128 << 20
#: That the process takes besides: Python, rows in flight, the vocabulary.
_RESERVED_BYTES = 200 << 20
#: Share of what is free that KV caches of their own may take; past it sequences share one.
_KV_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Sizes:
    """`kv_tokens`: room of all sequences together, who share it if `is_shared`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int
    is_shared: bool
    num_outputs: int  # positions of a step that have logits, at most
    weights_bytes: int
    kv_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.step_bytes + _RESERVED_BYTES


def sizes_of(spec: EngineSpec, available_bytes: int | None = None) -> Sizes:
    """For this machine as it is now, or with so much memory available."""
    available = available_memory_bytes() if available_bytes is None else available_bytes
    model, engine = spec.model, spec.job.engine
    length = model.max_model_len
    num_seqs = engine.max_num_seqs if isinstance(engine.max_num_seqs, int) else _NUM_SEQS
    num_tokens = _NUM_BATCHED_TOKENS
    of_prompts = requests_of(spec.demand).sampling.prompt_logprobs
    if of_prompts:
        num_tokens = max(num_seqs, min(num_tokens, _LOGITS_BYTES // (4 * model.vocab_size)))
    if isinstance(engine.max_num_batched_tokens, int):
        num_tokens = engine.max_num_batched_tokens
    num_tokens = max(num_tokens, num_seqs)
    num_outputs = num_tokens if of_prompts else num_seqs
    step = _step_bytes(spec, num_tokens, num_outputs)
    left = max(0, available - model.weights_bytes - step - _RESERVED_BYTES)
    room = int(left * _KV_SHARE) // max(1, model.kv_bytes_per_token)
    is_shared = num_seqs > 1 and num_seqs * length > room
    kv_tokens = max(length, min(room, num_seqs * length)) if is_shared else num_seqs * length
    return Sizes(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        kv_tokens=kv_tokens,
        is_shared=is_shared,
        num_outputs=num_outputs,
        weights_bytes=model.weights_bytes,
        kv_bytes=kv_tokens * model.kv_bytes_per_token,
        step_bytes=step,
    )


def _step_bytes(spec: EngineSpec, num_tokens: int, num_outputs: int) -> int:
    """Activations of a step, and its logits as they are computed and as they are looked through."""
    needs = spec.model.needs
    activations = needs.step_per_token * num_tokens if needs is not None else 0
    if needs is not None and spec.model.dtype == "float32":  # attention weights of whole sequences
        num_scores = min(num_tokens, MAX_UBATCH) * spec.model.max_model_len * needs.num_heads
        activations += 2 * 4 * num_scores
    return activations + 2 * 4 * spec.model.vocab_size * num_outputs


def shortage(spec: EngineSpec, available_bytes: int | None = None) -> str | None:
    """Why the model does not fit, and what would, in words; None if it does."""
    available = available_memory_bytes() if available_bytes is None else available_bytes
    sizes = sizes_of(spec, available)
    if sizes.total_bytes <= available:
        return None
    length, per_token = spec.model.max_model_len, spec.model.kv_bytes_per_token
    what = (
        f"it needs about {gib(sizes.weights_bytes)} for weights, {gib(sizes.step_bytes)} for a "
        f"step and {gib(length * per_token)} for the KV cache of one sequence of {length} tokens; "
        f"{gib(available)} of {gib(total_memory_bytes())} were free"
    )
    left = available - sizes.total_bytes + sizes.kv_bytes
    room = left // max(1, per_token)
    if room > 0:
        return f"{what}. What would fit: model.max_model_len {room}"
    return f"{what}. End what else runs there, or take a file of a smaller type"


def num_threads(spec: EngineSpec) -> int:
    asked = spec.job.engine.options.get("n_threads")
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if asked is None and variable.isdecimal() and int(variable) > 0:
        asked = int(variable)
    return asked or len(os.sched_getaffinity(0))
