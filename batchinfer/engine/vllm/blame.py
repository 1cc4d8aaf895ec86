"""Whose fault a lack of a GPU's memory is: the job's, or that of other processes there.

The first comes again with every start (exit 2, with settings that fit), the second passes (75, with
who holds what). Asked before the model is loaded, of what is certain, and after a failure, of what
is likely. Must not know: torch, vLLM's exceptions. All but `devices_of` and `look_at_devices` are
functions of devices, processes and an estimate.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from batchinfer.engine.crowd import Crowd, crowd_of
from batchinfer.engine.hardware import GIB, Gpu, Memory, gib, gpus
from batchinfer.engine.host import own_pids
from batchinfer.engine.vllm.fit import (
    MOST_UTILIZATION,
    RESERVED_BYTES,
    advice,
    estimate_of,
    room_of,
)
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError, MemoryHeld

#: Estimates of weights are from above where they are not exact; this much of one is certain.
_CERTAIN_SHARE = 0.9
#: Where an estimate says that all would fit beside the others, they are at fault from here on.
_LARGE_SHARE = 0.05


def devices_of(settings: VllmSettings) -> list[Gpu]:
    """The visible devices that share the model, as they are now; none where vLLM runs on the CPU,
    and where they are not all here: vLLM says that, or has the others elsewhere.
    """
    if this_machine().device != "cuda":
        return []
    found = gpus()[: settings.num_devices]
    return found if len(found) == settings.num_devices else []


def look_at_devices(settings: VllmSettings, sizes: tuple[int, int]) -> None:
    """Raise MemoryHeld or ConfigError for what is certain not to go well on this machine now."""
    devices = devices_of(settings)
    refuse_too_large(settings, sizes, devices)
    refuse_held(settings, devices, own_pids())


def refuse_too_large(
    settings: VllmSettings, sizes: tuple[int, int], devices: Sequence[Gpu]
) -> None:
    """Raise ConfigError if the model certainly fits one of these devices not even alone.

    `sizes`: max_num_seqs, max_num_batched_tokens.
    """
    for gpu in devices:
        if _certain_bytes(settings, len(devices)) > _usable_bytes(settings, gpu):
            raise ConfigError(
                f"{settings.model_path} does not fit the memory of {gpu.label} ({gpu.name}), even "
                f"if nobody else used it: {_advice_for_empty(settings, sizes, gpu)}"
            )


def refuse_held(settings: VllmSettings, devices: Sequence[Gpu], own: Collection[int]) -> None:
    """Raise MemoryHeld if the model certainly does not fit beside what others hold."""
    asked = settings.gpu_memory_utilization
    for gpu in devices:
        crowd = crowd_of(gpu, own)
        if not crowd.is_noticeable:
            continue
        free = f"of {gpu.label}, and {gib(gpu.free_bytes)} are free. {_what_to_do(crowd)}"
        if asked is not None and asked * gpu.total_bytes > gpu.free_bytes:  # vLLM does not start
            raise MemoryHeld(
                f"engine.gpu_memory_utilization {asked:g} asks for {gib(asked * gpu.total_bytes)} "
                f"{free}. auto would take what others leave"
            )
        least_bytes = RESERVED_BYTES + gpu.total_bytes // 100  # of which vLLM makes nothing
        least_bytes = max(least_bytes, _certain_bytes(settings, len(devices)))
        if least_bytes > gpu.free_bytes:
            raise MemoryHeld(f"{settings.model_path} needs at least {gib(least_bytes)} {free}")


def lack_of_memory(
    settings: VllmSettings,
    sizes: tuple[int, int],
    crowds: Sequence[Crowd],
    memory: Memory | None,
    what: str,
    said: str,
) -> ConfigError | MemoryHeld:
    """What it means that memory did not suffice. `what` happened; `said`: in the engine's words.

    `crowds`: the devices that share the model, now. `memory`: of the fullest, before loading.
    """
    blamed = next((crowd for crowd in crowds if _is_to_blame(settings, sizes, crowd)), None)
    if blamed is not None:
        return MemoryHeld(f"{what} {said}. {_what_to_do(blamed)}")
    if crowds:
        largest = max(crowds, key=lambda crowd: crowd.held_bytes)
        how = _advice_for_empty(settings, sizes, largest.gpu)
    elif memory is not None:
        how = advice(settings, sizes, memory)
    else:
        how = (
            f"lower engine.max_num_seqs (now {sizes[0]}) or engine.max_num_batched_tokens (now "
            f"{sizes[1]}), or end what else runs there"
        )
    return ConfigError(f"{what}: {how} {said}")


def is_too_large(
    settings: VllmSettings, sizes: tuple[int, int], memory: Memory | None
) -> bool | None:
    """Whether, by our estimate, no sequence of full length can run. None: there is no estimate."""
    if memory is None or settings.needs is None:
        return None
    found = estimate_of(settings, settings.needs, sizes)
    return room_of(settings, found, memory) < settings.max_model_len


def _is_to_blame(settings: VllmSettings, sizes: tuple[int, int], crowd: Crowd) -> bool:
    """Whether it is others: it would fit without them, and it does not fit beside them."""
    if not crowd.is_noticeable:
        return False
    total_bytes = crowd.gpu.total_bytes
    if is_too_large(settings, sizes, Memory(total_bytes, total_bytes)):
        return False
    asked = settings.gpu_memory_utilization
    if asked is not None and asked * total_bytes > crowd.left.free_bytes:
        return True
    if is_too_large(settings, sizes, crowd.left):
        return True
    return crowd.held_bytes > _LARGE_SHARE * total_bytes


def _usable_bytes(settings: VllmSettings, gpu: Gpu) -> int:
    """What a device that is otherwise idle gives. A KV cache of a set size ignores the share."""
    share = settings.gpu_memory_utilization or MOST_UTILIZATION
    if settings.options.get("kv_cache_memory_bytes") is not None:
        share = 1.0
    return int(share * gpu.total_bytes)


def _certain_bytes(settings: VllmSettings, num_devices: int) -> int:
    """What of one device the weights and one sequence of full length take at the very least."""
    needs = settings.needs
    if needs is None:
        return 0
    num_stages = max(1, num_devices // settings.tensor_parallel_size)
    weights = _CERTAIN_SHARE * needs.weights / num_devices - settings.cpu_offload_gib * GIB
    num_cached = settings.max_model_len if needs.caches_all_tokens else 0
    num_shards = min(settings.tensor_parallel_size, needs.num_kv_shards) * num_stages
    return int(max(0, weights) + num_cached * needs.kv_per_token / num_shards)


def _advice_for_empty(settings: VllmSettings, sizes: tuple[int, int], gpu: Gpu) -> str:
    return advice(settings, sizes, Memory(gpu.total_bytes, gpu.total_bytes))


def _what_to_do(crowd: Crowd) -> str:
    return (
        f"On {crowd}. Start again once that memory is free, or choose another device with "
        "CUDA_VISIBLE_DEVICES"
    )
