"""What vLLM really runs with: for the program, and in its own words for the records.

Must not know: requests, how an engine is built or driven.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batchinfer.engine.base import EngineFacts, Running
from batchinfer.engine.vllm.counting import graph_width
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.sizes import explain_sizes

log = logging.getLogger(__name__)


def facts_of(core: Any, settings: VllmSettings) -> EngineFacts:
    """Of an engine that is built."""
    import vllm
    from vllm.platforms import current_platform

    config = core.vllm_config
    cache = config.cache_config
    num_blocks, block_size = cache.num_gpu_blocks, cache.block_size
    return EngineFacts(
        name="vllm",
        version=str(vllm.__version__),
        device=str(current_platform.get_device_name()),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        quantization=config.model_config.quantization or "none",
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        kv_cache_tokens=num_blocks * block_size if num_blocks and block_size else None,
        running=Running(
            num_devices=settings.num_devices,
            kv_cache_dtype=str(cache.cache_dtype),
            is_eager=bool(config.model_config.enforce_eager),
            graph_width=graph_width(config),
            memory_share=cache.gpu_memory_utilization,
        ),
        extra={
            "tensor_parallel_size": settings.tensor_parallel_size,
            "pipeline_parallel_size": settings.pipeline_parallel_size,
            "enforce_eager": bool(config.model_config.enforce_eager),
            "graph_width": graph_width(config),
            "enable_prefix_caching": bool(cache.enable_prefix_caching),
            "kv_cache_dtype": str(cache.cache_dtype),
            "gpu_memory_utilization": cache.gpu_memory_utilization,
            "lora": settings.lora and settings.lora.path,
            "adapters": {name: lora.path for name, lora in settings.adapters.items()},
            "save_mode": settings.has_save_mode,
            "options": dict(settings.options),
        },
    )


def with_loaded(
    facts: EngineFacts, settings: VllmSettings, layers: Mapping[str, Any], warm_up_s: float | None
) -> EngineFacts:
    """With what is known once the weights are there. `layers`: see `quantized_layers`."""
    sizes = explain_sizes(
        settings, facts.max_num_seqs, facts.max_num_batched_tokens, facts.kv_cache_tokens
    )
    log.info("engine sizes: %s", sizes)
    kernels = tuple(layers.get("kernels") or ())
    return replace(
        facts,
        running=replace(facts.running, kernels=kernels, warm_up_s=warm_up_s),
        extra={**facts.extra, "warm_up_s": warm_up_s, "sizes": sizes, "layers": layers},
    )
