"""What vLLM's exceptions mean: the job's mistake, or circumstances that may pass.

Must not know: engines that run. vLLM has no types of its own for a lack of memory, so its sentences
are looked for here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from batchinfer.engine.base import EngineSettings
from batchinfer.engine.memory import Memory, advice, budget_of, estimate
from batchinfer.errors import ConfigError, EngineDied

#: In ValueErrors of vLLM 0.26 to 0.33, when profiling or sizing the KV cache.
_LACK_OF_MEMORY = (
    "No available memory for the cache blocks",
    "is less than desired",
    "is less than requested memory for kv",
    "is larger than the available KV cache",
)


def rejections() -> tuple[type[Exception], ...]:
    """What vLLM raises for a bad request: a ValueError up to 0.26, a family of its own later."""
    from vllm import exceptions

    return (ValueError, getattr(exceptions, "VLLMClientError", ValueError))


def construction_error(
    error: Exception, arguments: dict[str, Any], settings: EngineSettings, memory: Memory | None
) -> ConfigError | EngineDied:
    """What a failed start means: wrong values are the job's; a lost driver may come back.

    `memory`: what the device had before.
    """
    import torch

    model = arguments["model"]
    sizes = arguments["max_num_seqs"], arguments["max_num_batched_tokens"]
    is_short = any(sentence in str(error) for sentence in _LACK_OF_MEMORY)
    is_short |= isinstance(error, torch.OutOfMemoryError | MemoryError)
    is_refused = isinstance(
        error, (*rejections(), OSError, NotImplementedError, ImportError, TypeError)
    )
    # Of a worker's error, with several devices, vLLM tells no more than that there was one.
    if not is_short and not is_refused:
        is_short = _is_too_large(settings, sizes, memory)
    if is_short:
        how = f": {advice(settings, sizes, memory)}" if memory is not None else ""
        return ConfigError(
            f"{model} does not fit the device's memory{how} (vLLM: {first_line(error)})"
        )
    if is_refused:
        return ConfigError(f"vLLM cannot run {model} with these settings: {first_line(error)}")
    return EngineDied(
        f"the vLLM engine did not start: {first_line(error)}; the run's log has the whole story"
    )


def _is_too_large(settings: EngineSettings, sizes: tuple[int, int], memory: Memory | None) -> bool:
    """Whether, by our estimate, no sequence of full length can run. False where it is not known."""
    has_stages = settings.options.get("pipeline_parallel_size", 1) != 1  # not in the estimate
    if memory is None or settings.needs is None or has_stages:
        return False
    found = estimate(
        settings.needs,
        max_num_seqs=sizes[0],
        max_num_batched_tokens=sizes[1],
        num_devices=settings.tensor_parallel_size,
        cpu_offload_gib=settings.cpu_offload_gib,
    )
    return found.room_for_tokens(budget_of(settings, memory)) < settings.max_model_len


def first_line(error: BaseException) -> str:
    """The line that says it; of a pydantic ValidationError that is its first message."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors()[0]["msg"].removeprefix("Value error, ")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line or type(error).__name__
