"""What a run's engine was set to, as far as it limits speed or could be set otherwise.

Must not know: what was run.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.engine.base import EngineFacts
from batchinfer.model import ModelFacts
from batchinfer.verdict.peaks import Peaks, Precision
from batchinfer.verdict.work import ModelWork, work_of


@dataclass(frozen=True, slots=True)
class Setup:
    """`peaks` of all devices together; None: unknown. `work` None: unknown."""

    device: str
    width: int  # most sequences of a step
    max_step_tokens: int
    kv_tokens: int | None  # room of the KV cache
    work: ModelWork | None
    peaks: Peaks | None
    num_devices: int = 1
    can_fp8_weights: bool = False
    can_fp8_kv: bool = False
    graph_width: int | None = None  # steps of more sequences run without a CUDA graph
    is_eager: bool = False  # none has a graph, because the job says so
    is_narrowed: bool = False  # `width` is less than the engine could run, as that was faster
    utilization: float | None = None  # of the device's memory


def setup_of(
    facts: EngineFacts, model: ModelFacts, peaks: Peaks | None, *, has_all_logits: bool = False
) -> Setup:
    """`peaks` of one device."""
    running, num_devices = facts.running, facts.running.num_devices
    is_gpu = facts.device not in ("cpu", "none")
    has_fp8 = is_gpu and peaks is not None and "fp8" in peaks.flops_per_s
    is_plain = model.quantization == "none" and model.lora is None and not model.adapters
    runs_fp8 = model.needs is None or "fp8" in model.needs.smaller
    return Setup(
        device=facts.device if num_devices == 1 else f"{num_devices} {facts.device}",
        width=facts.max_num_seqs,
        max_step_tokens=facts.max_num_batched_tokens,
        kv_tokens=facts.kv_cache_tokens,
        work=work_of(model, linear=_precision(facts), has_all_logits=has_all_logits),
        peaks=peaks.times(num_devices) if peaks is not None else None,
        num_devices=num_devices,
        can_fp8_weights=has_fp8 and is_plain and runs_fp8,
        can_fp8_kv=has_fp8 and running.kv_cache_dtype in ("auto", "bfloat16", "float16"),
        graph_width=running.graph_width,
        is_eager=is_gpu and running.is_eager,
        utilization=running.memory_share if is_gpu else None,
    )


def _precision(facts: EngineFacts) -> Precision | None:
    """What linear layers are multiplied in, by the names of the engine's kernels."""
    kernels = " ".join(facts.running.kernels).lower()
    if "scaledmm" not in kernels:
        return "16 bit" if kernels and facts.dtype != "float32" else None
    return "fp8" if "fp8" in kernels else "int8" if "int8" in kernels else None
