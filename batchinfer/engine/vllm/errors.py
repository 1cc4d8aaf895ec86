"""What vLLM's exceptions mean: the job's mistake, or circumstances that may pass.

Must not know: engines that run. vLLM has no types of its own for a lack of memory, so its sentences
are looked for here and nowhere else.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchinfer.engine.crowd import Crowd, crowd_of
from batchinfer.engine.hardware import GIB, Memory, gib
from batchinfer.engine.host import available_memory_bytes, own_pids
from batchinfer.engine.vllm.blame import devices_of, is_too_large, lack_of_memory
from batchinfer.engine.vllm.cpu_library import loaded_cpu_library
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError, EngineDied, MemoryHeld, TransientError
from batchinfer.limits import (
    file_limit,
    is_short_of_memory,
    limit_met,
    memory_limit,
    sentence,
    thread_limit,
)

#: Wherever they stand: in errors of vLLM 0.26 to 0.33 when it profiles or sizes the KV cache, of
#: torch, CUDA, its libraries and NCCL; compilers and worker processes repeat them in their own.
_LACK_OF_MEMORY = re.compile(
    r"No available memory for the cache blocks|is less than desired|"
    r"is less than requested memory for kv|is larger than the available KV cache|"
    r"\bout of memory\b|_OUT_OF_MEMORY\b|OutOfMemoryError|cudaErrorMemoryAllocation|"
    r"_STATUS_ALLOC_FAILED|Failed to CUDA calloc"
)
#: What CUDA's libraries also say where a device has no room for their handle.
_NO_HANDLE = re.compile(r"\bCU[A-Z]+_STATUS_NOT_INITIALIZED")
_LACK_OF_HOST_MEMORY = re.compile(
    r"bad_alloc|DefaultCPUAllocator|Cannot allocate memory|MemoryError"
)
_TOO_MANY_FILES = os.strerror(errno.EMFILE)
#: CPython's words, and the C library's as others repeat them.
_NO_THREAD = re.compile(r"can't start new thread|Resource temporarily unavailable")
#: Of vLLM's profiler, when somebody else gave memory back while it measured.
_CHANGED_MEMORY = "Error in memory profiling"

#: Functions of vLLM's workers and engine core, and what they are at.
_PHASES = {
    "create_engine_config": "reading its settings",
    "init_device": "taking the device",
    "load_model": "loading the weights",
    "profile_run": "measuring what a step takes",
    "determine_available_memory": "measuring what a step takes",
    "get_kv_cache_configs": "sizing the KV cache",
    "initialize_from_config": "making the KV cache",
    "capture_model": "capturing CUDA graphs",
    "compile_or_warm_up_model": "warming up",
}
_COMPILERS = ("/torch/_inductor/", "/torch/_dynamo/", "/triton/")

#: Of an OSError, whoever makes it: what other processes may give back, and disks that may return.
_PASSING = frozenset(
    {
        errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT,
        errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.EADDRINUSE,
    }
)  # fmt: skip
#: Where weights are read and put into layers, and where triton calls a C compiler.
#: A file system without locks, or the like: the next start meets it, too.
_NEVER_PASSING = (errno.ENOSYS, errno.EOPNOTSUPP)
_PERMANENT_STAGES = ("/vllm/model_executor/model_loader/", "/triton/runtime/build.py")


#: What torch says of an operator that no library registered, or that is not there for the device.
_MISSING_KERNEL = (
    re.compile(r"'_OpNamespace' '\w+' object has no attribute '(\w+)'"),
    re.compile(r"Could not run '(\w+::\w+)(?:\.\w+)?' with arguments from the '\w+' backend"),
)

_MAX_REASON_CHARS = 1000


def rejections() -> tuple[type[Exception], ...]:
    """What vLLM raises for a bad request: a ValueError up to 0.26, a family of its own later."""
    from vllm import exceptions

    return (ValueError, getattr(exceptions, "VLLMClientError", ValueError))


def construction_error(
    error: Exception, arguments: dict[str, Any], settings: VllmSettings, memory: Memory | None
) -> ConfigError | TransientError:
    """What a failed start means: wrong values are the job's; a lost driver may come back.

    `memory`: what the device had before.
    """
    model = arguments["model"]
    sizes = arguments["max_num_seqs"], arguments["max_num_batched_tokens"]
    phase = phase_of(error)
    if lack := _lack(error, settings, sizes, memory, f"{model} does not fit the device's memory"):
        return lack
    if _CHANGED_MEMORY in str(error):
        return MemoryHeld(
            "other processes freed memory of the GPU while vLLM measured it: start again"
        )
    if missing := _missing_kernel(error):
        return ConfigError(f"vLLM cannot run {model} with these settings: {missing}")
    if missing := _missing_package(error):
        return ConfigError(f"vLLM cannot run {model} with these settings here: {missing}")
    if limit := _limit_of(error):
        return ConfigError(
            f"the vLLM engine did not start: {first_line(error)}{_at(phase)}. {limit}"
        )
    if _may_pass(error):
        return EngineDied(
            f"the vLLM engine did not start: {first_line(error)}{_at(phase)}; the run's log has "
            "the details"
        )
    what = first_line(error)
    if not isinstance(error, (*rejections(), OSError, ImportError)):  # made to be read
        frame = traceback.extract_tb(error.__traceback__)[-1]
        name = type(error).__name__
        what = f"{name if what == name else f'{name}: {what}'} ({frame.filename}:{frame.lineno})"
    return ConfigError(f"vLLM cannot run {model} with these settings: {what}{_at(phase)}")


def step_error(
    error: Exception,
    settings: VllmSettings,
    sizes: tuple[int, int],
    *,
    is_worker_dead: bool,
    is_killed: bool,
) -> ConfigError | EngineDied:
    """What a failed step means. A kernel that is not there will be missing at the next start too,
    and so will memory that nobody else holds; all else is given the benefit of the doubt.

    `is_killed`: the kernel has ended a process of ours for lack of the host's memory.
    """
    what = f"the device ran out of memory in a step of {settings.model_path}"
    lack = _lack(error, settings, sizes, None, what)
    if isinstance(lack, ConfigError):
        return lack
    if lack is not None:
        return EngineDied(str(lack))
    if missing := _missing_kernel(error):
        return ConfigError(f"the vLLM engine cannot compute this model: {missing}")
    if is_worker_dead:
        why = ", killed by the kernel because the host ran out of memory" if is_killed else ""
        return EngineDied(
            f"a worker process of the vLLM engine died{why}; the run's log has its last messages"
        )
    return EngineDied(f"the vLLM engine died: {type(error).__name__}: {first_line(error)}")


def phase_of(error: BaseException) -> str:
    """What vLLM was at: "while loading the weights"; "" if it was in a step, or nobody knows."""
    deepest = ""
    for cause in _chain(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            code = frame.f_code
            if any(folder in code.co_filename for folder in _COMPILERS):
                return "while compiling"
            deepest = _PHASES.get(code.co_name, deepest)
    return f"while {deepest}" if deepest else ""


def _at(phase: str) -> str:
    return f" ({phase})" if phase else ""


def _lack(
    error: Exception,
    settings: VllmSettings,
    sizes: tuple[int, int],
    memory: Memory | None,
    what: str,
) -> ConfigError | MemoryHeld | None:
    """What it means if the error is of memory that did not suffice; None if it is not."""
    import torch

    causes = [*_chain(error)]
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    phase = phase_of(error)
    by = f"vLLM, {phase}" if phase else "vLLM"
    said = f"({by}: {_line_of_lack(text) or first_line(error)})"
    is_host = any(isinstance(cause, MemoryError) for cause in causes)
    is_host |= _LACK_OF_HOST_MEMORY.search(text) is not None
    is_short = any(isinstance(cause, torch.OutOfMemoryError) for cause in causes)
    is_short |= _LACK_OF_MEMORY.search(text) is not None
    crowds = crowds_now(settings)
    if _NO_HANDLE.search(text):
        is_short |= any(crowd.gpu.free_bytes < GIB for crowd in crowds)
    if is_host and not is_short and crowds:
        return ConfigError(
            f"the host ran out of memory, {gib(available_memory_bytes())} are free now "
            f"{said}: end what else runs there, or lower model.save_mode_gib or "
            "model.cpu_offload_gib"
        )
    if not is_short and type(error) in (RuntimeError, Exception):
        # Of a worker's error, with several devices, vLLM reports no more than that there was one.
        is_short = settings.tensor_parallel_size > 1
        is_short = is_short and _is_likely_short(settings, sizes, memory, crowds)
    if is_host and not is_short and is_short_of_memory():
        return ConfigError(f"{what} {said}. {sentence(memory_limit() or '')}")
    if not (is_short or is_host):
        return None
    return lack_of_memory(settings, sizes, crowds, memory, what, said)


def _is_likely_short(
    settings: VllmSettings,
    sizes: tuple[int, int],
    memory: Memory | None,
    crowds: Sequence[Crowd],
) -> bool:
    """By our estimate, beside what was free before or what others leave now."""
    left = [crowd.left for crowd in crowds if crowd.is_noticeable]
    return any(is_too_large(settings, sizes, found) for found in (memory, *left))


def _line_of_lack(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    found = (line for line in lines if _LACK_OF_MEMORY.search(line) or _NO_HANDLE.search(line))
    return next(found, "")[:300]


def crowds_now(settings: VllmSettings) -> list[Crowd]:
    """Who holds memory of the devices that share the model, at this moment."""
    import torch

    own = own_pids()
    crowds = []
    for index, gpu in enumerate(devices_of(settings)):
        # Workers have processes of their own, of which we know nothing if the driver does not say.
        own_bytes = gpu.total_bytes
        if settings.tensor_parallel_size == 1 and torch.cuda.is_initialized():
            own_bytes = torch.cuda.memory_reserved(index)
        crowds.append(crowd_of(gpu, own, own_bytes))
    return crowds


def _missing_package(error: BaseException) -> str:
    """In words, the Python package that an error says is not there; "" if it says nothing so."""
    for cause in _chain(error):
        name = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if name and name.split(".")[0] not in ("vllm", "torch", "batchinfer"):
            return (
                f"the Python package {name.split('.')[0]} is not installed, which vLLM needs for "
                "them. Install it, or leave out the engine option that asks for it"
            )
    return ""


def _limit_of(error: BaseException) -> str | None:
    """The limit of this process that an error comes of, in words."""
    causes = [*_chain(error)]
    if any(_TOO_MANY_FILES in str(c) or getattr(c, "errno", None) == errno.EMFILE for c in causes):
        return sentence(file_limit())
    if any(_NO_THREAD.search(str(cause)) for cause in causes):
        return sentence(thread_limit())
    return limit_met()


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

    # What the system lacks comes again, though torch tells it as an error of other processes: files
    # of a TMPDIR without locks.
    if any(os.strerror(number) in str(error) for number in _NEVER_PASSING):
        return False
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
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def whole_reason(error: BaseException) -> str:
    """All that it says, where the first line alone names a place and not the fault."""
    text = str(error).strip()
    if len(text) > _MAX_REASON_CHARS:
        text = text[:_MAX_REASON_CHARS] + "..."
    return text if "\n" in text else first_line(error)


def first_line(error: BaseException) -> str:
    """The line that says it; of a pydantic ValidationError that is its first message."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        text = _first_problem(error.errors()[0])
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line or type(error).__name__


def _first_problem(found: Mapping[str, Any]) -> str:
    """With the option that has it and its value, where it is of one."""
    message = str(found["msg"]).removeprefix("Value error, ")
    value = found.get("input")
    if not found["loc"] or not isinstance(value, str | int | float | None):
        return message
    return f"{'.'.join(map(str, found['loc']))}: {message}, got {value!r}"
