"""What vLLM's exceptions mean: the job's mistake, or circumstances that may pass.

Must not know: engines that run. vLLM has no types of its own for a lack of memory, so its sentences
are looked for here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from batchinfer.engine.base import EngineSettings
from batchinfer.engine.memory import Memory, advice
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
    is_short = any(sentence in str(error) for sentence in _LACK_OF_MEMORY)
    if is_short or isinstance(error, torch.OutOfMemoryError | MemoryError):
        sizes = arguments["max_num_seqs"], arguments["max_num_batched_tokens"]
        how = f": {advice(settings, sizes, memory)}" if memory is not None else ""
        return ConfigError(
            f"{model} does not fit the device's memory{how} (vLLM: {first_line(error)})"
        )
    if isinstance(error, (*rejections(), OSError, NotImplementedError, ImportError, TypeError)):
        return ConfigError(f"vLLM cannot run {model} with these settings: {first_line(error)}")
    return EngineDied(
        f"the vLLM engine did not start: {first_line(error)}; the run's log has the whole story"
    )


def first_line(error: BaseException) -> str:
    """The line that says it; of a pydantic ValidationError that is its first message."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors()[0]["msg"].removeprefix("Value error, ")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line or type(error).__name__
