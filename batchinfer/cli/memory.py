"""What a job will take of memory, as text, for the commands that only look."""

from __future__ import annotations

from batchinfer.config import Job
from batchinfer.engine.fit import (
    advice,
    budget_of,
    device_memory,
    estimate_of,
    gib,
    room_of,
)
from batchinfer.engine.hardware import this_machine
from batchinfer.engine.vllm.sizes import cpu_kv_cache_bytes, expected_sizes
from batchinfer.model import ModelFacts
from batchinfer.runner.factory import engine_settings


def memory_lines(job: Job, model: ModelFacts) -> list[str]:
    """What it needs, then what there is; none where the weights or the device are unknown."""
    settings = engine_settings(job, model)
    is_cpu = this_machine().device == "cpu"
    memory = device_memory(settings.tensor_parallel_size, is_cpu=is_cpu)
    if model.needs is None:
        return []
    sizes = expected_sizes(settings)
    num_seqs, num_tokens = sizes
    found = estimate_of(settings, model.needs, sizes)
    length = settings.max_model_len
    lines = [
        f"about {gib(found.weights)} of weights ({model.quantization}), {gib(found.step)} for a "
        f"step of {num_tokens:,} tokens and {num_seqs:,} sequences, "
        f"{gib(found.cache_bytes(length))} of KV cache for {length:,} tokens",
    ]
    if memory is None:
        return lines
    budget = budget_of(settings, memory)
    room = room_of(settings, found, memory)
    if room < length:
        return [*lines, f"does not fit: {advice(settings, sizes, memory)}"]
    left = "the engine's"
    if is_cpu:
        left = "free, of which it takes a part for its KV cache"
        if "kv_cache_memory_bytes" not in settings.options:  # clearing it takes seconds
            room = min(room, found.tokens_in(cpu_kv_cache_bytes(settings, num_seqs)))
    return [
        *lines,
        f"{gib(budget)} of {gib(memory.total_bytes)} are {left}: room for {room:,} tokens, "
        f"{room // length:,} sequences of {length:,}",
    ]
