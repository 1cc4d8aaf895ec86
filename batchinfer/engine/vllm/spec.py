"""A job and its model as vLLM takes them.

Must not know: vLLM's own names for arguments.
"""

from __future__ import annotations

from batchinfer.config import thaw
from batchinfer.engine.base import EngineSettings, EngineSpec


def engine_settings(spec: EngineSpec) -> EngineSettings:
    """The plain settings that vLLM is sized and built by."""
    job, model = spec.job, spec.model
    return EngineSettings(
        model_path=model.path,
        tokenizer_path=model.tokenizer_path,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        weights_bytes=model.weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        sampling=spec.sampling,
        tensor_parallel_size=job.model.tensor_parallel_size,
        trust_remote_code=job.model.trust_remote_code,
        quantization=model.engine_quantization,
        is_quantized=model.quantization != "none",
        quantization_name=model.quantization,
        kv_cache_dtype=job.model.kv_cache_dtype,
        lora=model.lora,
        has_save_mode=job.model.save_mode,
        save_mode_gib=job.model.save_mode_gib,
        cpu_offload_gib=job.model.cpu_offload_gib,
        max_num_seqs=_size(job.engine.max_num_seqs),
        max_num_batched_tokens=_size(job.engine.max_num_batched_tokens),
        gpu_memory_utilization=_share(job.engine.gpu_memory_utilization),
        needs=model.needs,
        options=thaw(job.engine.options),
    )


def _share(value: float | str) -> float | None:
    """`auto` is what other processes leave."""
    return None if isinstance(value, str) else value


def _size(value: int | str | None) -> int | None:
    """`auto` is the engine's to choose."""
    return value if isinstance(value, int) else None
