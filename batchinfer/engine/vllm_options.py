"""Which of vLLM's engine arguments leave results alone, so that they may change between two runs.

Must not know: vLLM itself, jobs. Whatever is not named here decides results: an argument that a
later vLLM brings is frozen until somebody has read what it does. The measure is the one of
`model.tensor_parallel_size`, which may change too: sums may be made in another order, and so be
rounded otherwise. Another precision, another kernel family (some of them quantize activations),
other weights, another tokenizer, other logprobs may not.
Names are those of vLLM 0.26 to 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: When which token of which sequence is computed. A sequence's own tokens do not depend on it.
_SCHEDULING = (
    "async_scheduling",
    "disable_cascade_attn",
    "disable_chunked_mm_input",
    "enable_chunked_prefill",
    "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive",
    "max_long_partial_prefills",
    "max_num_active_seqs",
    "max_num_partial_prefills",
    "max_num_scheduled_tokens",
    "performance_mode",
    "prefill_schedule_interval",
    "scheduler_reserve_full_isl",
    "scheduling_policy",  # requests have no priorities here
    "watermark",
)
#: How much memory what is kept in, and where. What is evicted or was not cached is computed again.
_MEMORY = (
    "block_size",
    "cpu_offload_params",
    "disable_hybrid_kv_cache_manager",
    "enable_cumem_allocator",
    "enable_prefix_caching",
    "enable_sleep_mode",
    "kv_cache_memory_bytes",
    "kv_offloading_backend",
    "language_model_only",
    "limit_mm_per_prompt",  # prompts are text: this is how much is kept for images
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "num_gpu_blocks_override",
    "offload_backend",
    "offload_group_size",
    "offload_num_in_group",
    "offload_params",
    "offload_prefetch_step",
    "prefix_cache_retention_interval",
    "prefix_caching_hash_algo",
    "skip_mm_profiling",
    "swap_space",
)
#: On which devices and processes the same sums are made, and how they find each other.
#: `all2all_backend` is not among them: some backends send activations in 8 bits.
_PARALLELISM = (
    "cp_kv_cache_interleave_size",
    "cpu_distributed_timeout_seconds",
    "dbo_decode_token_threshold",
    "dbo_prefill_token_threshold",
    "dcp_comm_backend",
    "dcp_kv_cache_interleave_size",
    "dcp_q_replicate",
    "decode_context_parallel_size",
    "device_ids",
    "disable_custom_all_reduce",
    "disable_nccl_for_dp_synchronization",
    "distributed_executor_backend",
    "distributed_timeout_seconds",
    "enable_dbo",
    "enable_ep_weight_filter",
    "enable_eplb",
    "enable_expert_parallel",
    "eplb_config",
    "expert_placement_strategy",
    "fully_sharded_loras",
    "master_addr",
    "master_port",
    "mm_encoder_tp_mode",
    "nnodes",
    "node_rank",
    "numa_bind",
    "numa_bind_cpus",
    "numa_bind_nodes",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "ray_workers_use_nsight",
    "renderer_num_workers",
    "ubatch_size",
)
#: Compiled, captured or called one by one: the same operations, some fused. That holds for all of
#: the mapping `compilation_config`, whose keys name passes, modes, sizes and folders.
_COMPILING = (
    "compilation_config",
    "cuda_graph_sizes",
    "cudagraph_capture_sizes",
    "enable_flashinfer_autotune",
    "enforce_eager",
    "full_cuda_graph",
    "max_cudagraph_capture_size",
    "optimization_level",
    "use_inductor",
)
#: How the same bytes of the weights come into memory. `load_format`, `ignore_patterns` and
#: `model_loader_extra_config` may name other bytes.
_LOADING = (
    "download_dir",
    "max_parallel_loading_workers",
    "pt_load_map_location",
    "safetensors_load_strategy",
    "safetensors_prefetch_block_size",
    "safetensors_prefetch_num_threads",
    "use_tqdm_on_load",
)
#: What is told to people and to other programs, and what happens when the engine ends.
_REPORTING = (
    "aggregate_engine_logging",
    "collect_detailed_traces",
    "cudagraph_metrics",
    "custom_histogram_buckets",
    "disable_log_requests",
    "enable_layerwise_nvtx_tracing",
    "enable_logging_iteration_details",
    "enable_mfu_metrics",
    "enable_mm_processor_stats",
    "fail_on_environ_validation",
    "jit_monitor_mode",
    "jit_monitor_verbose",
    "kv_cache_metrics",
    "kv_cache_metrics_sample",
    "kv_events_config",
    "log_config_file",
    "log_level",
    "logging_config",
    "otlp_traces_endpoint",
    "per_request_spec_decode_metrics",
    "profiler_config",
    "served_model_name",
    "show_hidden_metrics_for_version",
    "shutdown_timeout",
)

HARMLESS_OPTIONS = frozenset(
    (*_SCHEDULING, *_MEMORY, *_PARALLELISM, *_COMPILING, *_LOADING, *_REPORTING)
)


def deciding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that an output was, or will be, computed with for good."""
    return {name: value for name, value in options.items() if name not in HARMLESS_OPTIONS}
