"""How large vLLM's engine is made: sequences and tokens of a step, memory, KV cache on a CPU.

Must not know: options that are not sizes, requests.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from batchinfer.engine.hardware import GIB, gib, gpus
from batchinfer.engine.host import available_memory_bytes
from batchinfer.engine.vllm.fit import (
    BLOCK_TOKENS,
    MOST_UTILIZATION,
    auto_sizes,
    auto_utilization,
    device_memory,
)
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError

log = logging.getLogger(__name__)

#: Zeroing the KV cache is part of a start on the CPU, 1 to 2 s for each GiB (two cores): it grows
#: with the weights, and a small model does not wait for room that its requests never fill.
MIN_CPU_KV_CAP_BYTES = GIB // 2
CPU_KV_CAP_WEIGHTS = 4
#: vLLM captures CUDA graphs of up to this many tokens by itself, whatever max_num_seqs is (up to
#: 1,024 on data centre GPUs of Blackwell).
_CAPTURED = 512
#: Graphs are captured up to this many: a graph saves the host's time between kernels, and from here
#: on the kernels take longer than the host (measured on an H200 with an 8B model).
_MOST_CAPTURED = 1024
#: vLLM arguments of a job that has its own mind about graphs.
_GRAPH_OPTIONS = frozenset(
    {
        "cuda_graph_sizes",
        "cudagraph_capture_sizes",
        "enforce_eager",
        "full_cuda_graph",
        "max_cudagraph_capture_size",
        "optimization_level",
        "speculative_config",
    }
)
#: The same, of its mapping `compilation_config`. Its other keys name passes and folders.
_GRAPH_KEYS = frozenset(
    {
        "cudagraph_capture_sizes",
        "cudagraph_mode",
        "full_cuda_graph",
        "level",
        "max_capture_size",
        "max_cudagraph_capture_size",
        "mode",
        "use_cudagraph",
    }
)


def default_sizes(num_devices: int) -> tuple[int, int]:
    """max_num_seqs, max_num_batched_tokens of vLLM's own `LLM` class on this hardware.

    An engine built without a usage context would get 128 and 2048 everywhere. They are upper
    bounds: the scheduler runs what the KV cache has room for.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    of_tokens, of_seqs = EngineArgs.get_batch_defaults(num_devices)
    return of_seqs[UsageContext.LLM_CLASS], of_tokens[UsageContext.LLM_CLASS]


def needs_whole_prompts(settings: VllmSettings, *, is_cpu: bool) -> bool:
    """Whether a prompt is computed in one step: vLLM cannot rewind a CPU's random state."""
    has_whole_prompts = is_cpu and settings.requests.uses_seeds
    return settings.options.get("enable_chunked_prefill", not has_whole_prompts) is False


def fit_sizes(
    settings: VllmSettings, defaults: tuple[int, int], *, has_whole_prompts: bool
) -> tuple[int, int]:
    """max_num_seqs, max_num_batched_tokens: the job's, or what suits the device and each other.

    `defaults` are the device's; `has_whole_prompts`: prompts are computed in one step. Raises
    ConfigError.
    """
    max_num_seqs, max_num_batched_tokens = defaults
    if settings.max_num_seqs is not None:
        max_num_seqs = settings.max_num_seqs
    elif settings.max_num_batched_tokens is not None:
        max_num_seqs = min(max_num_seqs, settings.max_num_batched_tokens)
    if settings.max_num_batched_tokens is None:
        max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        if has_whole_prompts:
            max_num_batched_tokens = max(max_num_batched_tokens, settings.max_model_len)
        return max_num_seqs, max_num_batched_tokens
    max_num_batched_tokens = settings.max_num_batched_tokens
    if has_whole_prompts and max_num_batched_tokens < settings.max_model_len:
        raise ConfigError(
            f"engine.max_num_batched_tokens is {max_num_batched_tokens}, but prompts are read "
            f"whole (sampling.seed on a CPU, or enable_chunked_prefill: false): set it to auto, or "
            f"to at least model.max_model_len, {settings.max_model_len}"
        )
    return max_num_seqs, max_num_batched_tokens


def graph_sizes(settings: VllmSettings, max_num_seqs: int) -> int | None:
    """The most tokens of a step that a CUDA graph is captured of; None: as vLLM chooses.

    Graphs have to cover what runs: a step of more sequences than the largest graph runs without
    one, and so does every step of a job whose KV cache has room for all of max_num_seqs.
    """
    options = settings.options
    compilation = options.get("compilation_config", {})
    if not isinstance(compilation, Mapping) or _GRAPH_KEYS & compilation.keys():
        return None
    if max_num_seqs <= _CAPTURED or _GRAPH_OPTIONS & options.keys():
        return None
    return min(max_num_seqs, _MOST_CAPTURED)


def expected_sizes(settings: VllmSettings) -> tuple[int, int]:
    """`fit_sizes` on this machine, known without vLLM."""
    is_cpu = this_machine().device == "cpu"
    defaults = auto_sizes(gpus(), is_cpu=is_cpu)
    return fit_sizes(
        settings, defaults, has_whole_prompts=needs_whole_prompts(settings, is_cpu=is_cpu)
    )


def explain_sizes(
    settings: VllmSettings,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_tokens: int | None,
) -> str:
    """What the sizes are, and why; and how long sequences may be if that many run at once."""
    default_seqs, default_tokens = default_sizes(settings.num_devices)
    words = []
    for name, asked, size, default in (
        ("max_num_seqs", settings.max_num_seqs, max_num_seqs, default_seqs),
        (
            "max_num_batched_tokens",
            settings.max_num_batched_tokens,
            max_num_batched_tokens,
            default_tokens,
        ),
    ):
        why = "vLLM's default on this hardware"
        if asked is not None:
            why = "the job's"
        elif size != default:
            why = f"auto: {default}, fitted to the job's other sizes"
        words.append((f"{name} {size}", why))
    if words[0][1] == words[1][1]:
        words = [(", ".join(size for size, _ in words), why)]
    sentences = [f"{size} ({why})" for size, why in words]
    if kv_cache_tokens is not None:
        num_tokens = min(kv_cache_tokens // max_num_seqs, settings.max_model_len)
        sentences.append(
            f"KV cache for {kv_cache_tokens} tokens: all {max_num_seqs} run while they have "
            f"{num_tokens} tokens on average, else fewer"
        )
    return "; ".join(sentences)


def utilization(settings: VllmSettings, *, is_cpu: bool) -> float:
    """The job's; or what other processes leave of the device, which the log says."""
    if settings.gpu_memory_utilization is not None:
        return settings.gpu_memory_utilization
    if is_cpu:
        return MOST_UTILIZATION  # without effect: the KV cache has a size of its own
    memory = device_memory(settings.num_devices, is_cpu=False)
    share = auto_utilization(memory)
    if memory is not None and share < MOST_UTILIZATION:
        log.warning(
            "gpu_memory_utilization auto is %.2f: other processes hold memory of the GPU, %s of %s "
            "are free",
            share,
            gib(memory.free_bytes),
            gib(memory.total_bytes),
        )
    else:
        log.info("gpu_memory_utilization auto is %.2f", share)
    return share


def cpu_kv_cache_bytes(settings: VllmSettings, max_num_seqs: int) -> int:
    """Room for every sequence at its longest, within the caps; at least for one sequence."""
    blocks_per_sequence = -(-settings.max_model_len // BLOCK_TOKENS) + 1
    sequence_bytes = blocks_per_sequence * BLOCK_TOKENS * settings.kv_bytes_per_token
    cap = max(MIN_CPU_KV_CAP_BYTES, CPU_KV_CAP_WEIGHTS * settings.weights_bytes)
    cap = min(cap, available_memory_bytes() // 4)
    return max(sequence_bytes, min(max_num_seqs * sequence_bytes, cap))
