"""What vLLM's exceptions mean: the job's mistake, or circumstances that may pass.

Must not know: engines that run. vLLM has no types of its own for a lack of memory, so its sentences
are looked for here and nowhere else.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from typing import Any

from batchinfer.engine.base import EngineSettings
from batchinfer.engine.cpu_library import loaded_cpu_library
from batchinfer.engine.memory import Memory, advice, estimate_of, room_of
from batchinfer.errors import ConfigError, EngineDied

#: In ValueErrors of vLLM 0.26 to 0.33, when profiling or sizing the KV cache.
_LACK_OF_MEMORY = (
    "No available memory for the cache blocks",
    "is less than desired",
    "is less than requested memory for kv",
    "is larger than the available KV cache",
)

#: Of an OSError, whoever makes it: what other processes may give back, and disks that may return.
_PASSING = frozenset(
    {
        errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT,
        errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.EADDRINUSE,
    }
)  # fmt: skip
#: Where weights are read and put into layers, and where triton calls a C compiler.
_PERMANENT_STAGES = ("/vllm/model_executor/model_loader/", "/triton/runtime/build.py")


#: What torch says of an operator that no library registered, or that is not there for the device.
_MISSING_KERNEL = (
    re.compile(r"'_OpNamespace' '\w+' object has no attribute '(\w+)'"),
    re.compile(r"Could not run '(\w+::\w+)(?:\.\w+)?' with arguments from the '\w+' backend"),
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
    # Of a worker's error, with several devices, vLLM tells no more than that there was one.
    if type(error) in (RuntimeError, Exception) and settings.tensor_parallel_size > 1:
        is_short |= _is_too_large(settings, sizes, memory)
    if is_short:
        how = f": {advice(settings, sizes, memory)}" if memory is not None else ""
        return ConfigError(
            f"{model} does not fit the device's memory{how} (vLLM: {first_line(error)})"
        )
    if missing := _missing_kernel(error):
        return ConfigError(f"vLLM cannot run {model} with these settings: {missing}")
    if _may_pass(error):
        return EngineDied(
            f"the vLLM engine did not start: {first_line(error)}; the run's log has the whole story"
        )
    what = first_line(error)
    if not isinstance(error, (*rejections(), OSError, ImportError)):  # made to be read
        frame = traceback.extract_tb(error.__traceback__)[-1]
        name = type(error).__name__
        what = f"{name if what == name else f'{name}: {what}'} ({frame.filename}:{frame.lineno})"
    return ConfigError(f"vLLM cannot run {model} with these settings: {what}")


def step_error(error: Exception, *, is_worker_dead: bool) -> ConfigError | EngineDied:
    """What a failed step means. A kernel that is not there will be missing at the next start too;
    all else is given the benefit of the doubt.
    """
    if missing := _missing_kernel(error):
        return ConfigError(f"the vLLM engine cannot compute this model: {missing}")
    if is_worker_dead:
        return EngineDied(
            "a worker process of the vLLM engine died; the run's log has what it said last"
        )
    return EngineDied(f"the vLLM engine died: {type(error).__name__}: {first_line(error)}")


def _missing_kernel(error: BaseException) -> str:
    """In words, the kernel that an error says is not there; "" if it says something else.

    The text is looked at, as a worker process passes on no more of its error.
    """
    for cause in _chain(error):
        for pattern in _MISSING_KERNEL:
            if found := pattern.search(str(cause)):
                library = loaded_cpu_library()
                where = f"its library for this CPU, {library}, lacks it" if library else "not here"
                return (
                    f"it needs vLLM's kernel {found[1]}, and {where}. Take another "
                    "model.quantization or checkpoint (see `batchinfer doctor`)"
                )
    return ""


def _may_pass(error: Exception) -> bool:
    """Whether the same start may succeed later: schedulers repeat it for as long as we say so.

    Circumstances have types: the device's errors, those of other processes, and errno. Where they
    have none, libraries raise plain RuntimeErrors or Exceptions (a lost driver; a process that does
    not tell its own error), which are given the benefit of the doubt, except where only the model's
    files and the installed compilers decide. All other types say that code met values it was not
    made for (AssertionError, KeyError, the compilers' own): those come again with every start.
    """
    import torch
    from torch import distributed
    from vllm.v1.engine.exceptions import EngineDeadError

    outside = (torch.AcceleratorError, distributed.DistError, EngineDeadError, TimeoutError)
    if any(isinstance(cause, outside) for cause in _chain(error)):
        return True
    if getattr(error, "errno", None) in _PASSING:
        return True
    if type(error) not in (RuntimeError, Exception):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    files = [frame.f_code.co_filename for frame, _ in frames]
    return not any(stage in file for file in files for stage in _PERMANENT_STAGES)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised for: compilers wrap a device's errors in their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_too_large(settings: EngineSettings, sizes: tuple[int, int], memory: Memory | None) -> bool:
    """Whether, by our estimate, no sequence of full length can run. False where it is not known."""
    has_stages = settings.options.get("pipeline_parallel_size", 1) != 1  # not in the estimate
    if memory is None or settings.needs is None or has_stages:
        return False
    found = estimate_of(settings, settings.needs, sizes)
    return room_of(settings, found, memory) < settings.max_model_len


def first_line(error: BaseException) -> str:
    """The line that says it; of a pydantic ValidationError that is its first message."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors()[0]["msg"].removeprefix("Value error, ")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line or type(error).__name__
