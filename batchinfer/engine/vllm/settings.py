"""A job and its model as vLLM takes them.

Must not know: vLLM's own names for arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchinfer.config import Job, thaw
from batchinfer.engine.base import Demand, EngineSpec
from batchinfer.engine.vllm.requests import Requests, requests_of
from batchinfer.model import Lora, Needs


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """What vLLM is sized and built by. `None` sizes are chosen for the hardware."""

    model_path: str
    tokenizer_path: str
    dtype: str
    max_model_len: int
    weights_bytes: int
    kv_bytes_per_token: int
    demand: Demand
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    trust_remote_code: bool = False
    quantization: str | None = None  # vLLM's name for it; None: as the checkpoint says
    is_quantized: bool = True  # if vLLM takes a name: whether layers have to be
    kv_cache_dtype: str = "auto"
    lora: Lora | None = None  # an adapter that every request uses, unless it names another
    adapters: Mapping[str, Lora] = field(default_factory=dict)  # those that requests name
    has_save_mode: bool = False  # KV blocks without room on the GPU go to the host
    save_mode_gib: float | None = None
    cpu_offload_gib: float = 0.0  # of weights, for each GPU
    keeps_packed: bool = False  # a CPU its coded weights, which it would else decode at once
    packing_note: str = ""  # of that, for the log
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None  # None: what other processes leave
    needs: Needs | None = None  # the estimate that advice is made of
    options: dict[str, Any] = field(default_factory=dict)  # vLLM's engine arguments by name

    @property
    def loras(self) -> list[Lora]:
        """All adapters."""
        return [*([self.lora] if self.lora is not None else []), *self.adapters.values()]

    @property
    def num_devices(self) -> int:
        """That one engine takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def requests(self) -> Requests:
        """What vLLM does for the demand."""
        return requests_of(self.demand)


def vllm_settings(spec: EngineSpec) -> VllmSettings:
    """The plain settings that vLLM is sized and built by."""
    job, model = spec.job, spec.model
    return VllmSettings(
        model_path=model.path,
        tokenizer_path=model.tokenizer_path,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        weights_bytes=model.weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        demand=spec.demand,
        tensor_parallel_size=job.model.tensor_parallel_size,
        pipeline_parallel_size=num_stages_of(job),
        trust_remote_code=job.model.trust_remote_code,
        quantization=model.engine_quantization,
        is_quantized=model.quantization != "none",
        kv_cache_dtype=job.model.kv_cache_dtype,
        lora=model.lora,
        adapters=model.adapters,
        has_save_mode=job.model.save_mode,
        save_mode_gib=job.model.save_mode_gib,
        cpu_offload_gib=job.model.cpu_offload_gib,
        max_num_seqs=_size(job.engine.max_num_seqs),
        max_num_batched_tokens=_size(job.engine.max_num_batched_tokens),
        gpu_memory_utilization=_share(job.engine.gpu_memory_utilization),
        needs=model.needs,
        options=thaw(job.engine.options),
    )


def num_devices_of(job: Job) -> int:
    """How many devices one engine of the job takes."""
    return job.model.tensor_parallel_size * num_stages_of(job)


def num_stages_of(job: Job) -> int:
    """The setting, or vLLM's argument of the same name, as job files had it before."""
    of_options = job.engine.options.get("pipeline_parallel_size")
    if job.model.pipeline_parallel_size == 1 and isinstance(of_options, int) and of_options > 0:
        return of_options
    return job.model.pipeline_parallel_size


def _share(value: float | str) -> float | None:
    """`auto` is what other processes leave."""
    return None if isinstance(value, str) else value


def _size(value: int | str | None) -> int | None:
    """`auto` is the engine's to choose."""
    return value if isinstance(value, int) else None
