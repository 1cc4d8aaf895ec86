"""What a model needs beside what a device has: before loading, and when loading has failed.

Must not know: torch; vLLM is not imported. The estimates are those of model/needs.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from batchinfer.engine.hardware import GIB, Gpu, Memory, gib, gpus
from batchinfer.engine.host import available_memory_bytes, total_memory_bytes
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError, MemoryHeld, short_of
from batchinfer.limits import shortage
from batchinfer.model import Needs
from batchinfer.quantization import Machine

#: Of a GPU nobody else uses. What is left is for what vLLM does not count: prompt logprobs, graphs.
MOST_UTILIZATION = 0.9
#: What is named where a user may ask for more.
MOST_ASKED = 0.98
#: A CUDA context, its libraries and graphs: taken from the device and in none of the estimates.
RESERVED_BYTES = GIB
#: Above this a GPU gets vLLM's larger steps, unless it is an A100.
_LARGE_GPU_BYTES = 70 * GIB
#: A block of vLLM's KV cache on a CPU; 16 on a GPU. One block is never a sequence's.
BLOCK_TOKENS = 128
#: What vLLM takes on two cores of a CPU beside the model, from its import on; measured with the
#: least limits under which the demo ran.
_IMPORTED_BYTES = int(1.1 * GIB)
_NUM_FILES = 52
_NUM_THREADS = 32


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on each device."""

    weights: int
    step: int  # activations and logits of one step
    kv_per_token: int

    def room_for_tokens(self, budget_bytes: int) -> int:
        """Tokens that the KV cache holds in what weights and a step leave of `budget_bytes`."""
        return self.tokens_in(budget_bytes - self.weights - self.step)

    def tokens_in(self, cache_bytes: int) -> int:
        """In whole blocks, without the one that vLLM keeps to itself."""
        num_blocks = cache_bytes // (self.kv_per_token * BLOCK_TOKENS) - 1
        return max(0, num_blocks) * BLOCK_TOKENS

    def cache_bytes(self, num_tokens: int) -> int:
        """The least cache that has room for that many tokens."""
        return (-(-num_tokens // BLOCK_TOKENS) + 1) * BLOCK_TOKENS * self.kv_per_token


def device_memory(num_devices: int, *, is_cpu: bool) -> Memory | None:
    """Now; of the devices that share the model, the one with the least. None: unknown."""
    if is_cpu:
        return Memory(total_memory_bytes(), available_memory_bytes(), is_gpu=False)
    devices = [Memory(gpu.total_bytes, gpu.free_bytes) for gpu in gpus()[:num_devices]]
    return min(devices, key=_free_share, default=None)


def auto_utilization(memory: Memory | None) -> float:
    """The share of a GPU's memory to use: 0.9, or what other processes leave of it.

    Raises MemoryHeld if they leave nothing.
    """
    if memory is None:
        return MOST_UTILIZATION
    share = _auto_share(memory)
    if share < 0.01:
        raise MemoryHeld(
            f"other processes hold the GPU's memory: {gib(memory.free_bytes)} of "
            f"{gib(memory.total_bytes)} are free. End them, or choose another device with "
            "CUDA_VISIBLE_DEVICES"
        )
    return share


def auto_sizes(gpus: Sequence[Gpu], *, is_cpu: bool) -> tuple[int, int]:
    """max_num_seqs, max_num_batched_tokens that vLLM's `LLM` class takes, known without vLLM."""
    if is_cpu:
        return 256, 4096
    if gpus and gpus[0].total_bytes >= _LARGE_GPU_BYTES and "a100" not in gpus[0].name.lower():
        return 1024, 16384
    return 256, 8192


def check_offload(has_save_mode: bool, cpu_offload_gib: float, machine: Machine) -> None:
    """Raise ConfigError where the host's memory cannot be a second one, as it is the only one."""
    for key, is_asked in (("save_mode", has_save_mode), ("cpu_offload_gib", cpu_offload_gib > 0)):
        if is_asked and machine.device == "cpu":
            raise ConfigError(
                f"model.{key} cannot run here: it moves data between a GPU's memory and the host's,"
                " and vLLM runs on the CPU here. Leave it out"
            )


def check_limits(settings: VllmSettings, sizes: tuple[int, int], machine: Machine) -> None:
    """Raise for limits of this process (`ulimit`) that are certainly too low, before vLLM is
    imported: where they are met later, its libraries end the process themselves.
    """
    num_bytes = _IMPORTED_BYTES
    if machine.device == "cpu" and settings.needs is not None:
        found = estimate_of(settings, settings.needs, sizes)
        num_bytes += found.weights + found.step + found.cache_bytes(settings.max_model_len)
    short = shortage(num_files=_NUM_FILES, num_bytes=num_bytes, num_threads=_NUM_THREADS)
    if short is not None:
        raise short_of(f"vLLM with {settings.model_path}", short)


def estimate(
    needs: Needs,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_devices: int = 1,
    num_stages: int = 1,
    cpu_offload_gib: float = 0.0,
) -> Estimate:
    """On the fullest device. `num_devices` share each layer, `num_stages` times as many the layers.

    A step is counted whole on each device: its residuals and logits are on all of them.

    A KV head is on at least one device, and a latent vector, which is for all heads, on each.
    """
    step = max(max_num_batched_tokens * needs.step_per_token, max_num_seqs * needs.logits_per_row)
    step += -(-needs.dequantized // num_devices)
    weights, kv_per_token = needs.weights, needs.kv_per_token
    if num_stages > 1:  # as many layers for each as another may have at most
        num_layers = -(-needs.num_layers // num_stages)
        at_ends = min(weights, needs.at_ends)
        weights = -(-(weights - at_ends) * num_layers // needs.num_layers)
        weights += min(at_ends, needs.at_one_end)
        kv_per_token = -(-kv_per_token * num_layers // needs.num_layers)
    return Estimate(
        weights=max(0, -(-weights // num_devices) - int(cpu_offload_gib * GIB)),
        step=step,
        kv_per_token=-(-kv_per_token // min(num_devices, needs.num_kv_shards)),
    )


def estimate_of(settings: VllmSettings, needs: Needs, sizes: tuple[int, int]) -> Estimate:
    """`sizes`: max_num_seqs, max_num_batched_tokens."""
    return estimate(
        needs,
        max_num_seqs=sizes[0],
        max_num_batched_tokens=sizes[1],
        num_devices=settings.tensor_parallel_size,
        num_stages=settings.pipeline_parallel_size,
        cpu_offload_gib=settings.cpu_offload_gib,
    )


def advice(settings: VllmSettings, sizes: tuple[int, int], memory: Memory) -> str:
    """What is short, and the largest settings that would fit. `memory`: before the model came.

    `sizes`: max_num_seqs, max_num_batched_tokens.
    """
    needs = settings.needs
    if needs is None:
        return (
            f"end what else runs there, lower model.max_model_len (now {settings.max_model_len}) "
            f"or engine.max_num_seqs (now {sizes[0]}), or raise model.tensor_parallel_size"
        )
    found = estimate_of(settings, needs, sizes)
    length = settings.max_model_len
    budget = budget_of(settings, memory)
    what = (
        f"it needs about {gib(found.weights)} for weights, {gib(found.step)} for a step and "
        f"{gib(found.cache_bytes(length))} for the KV cache of one sequence of {length} tokens; "
        + _had(memory)
    )
    if memory.is_gpu:
        what += f", of which it may use {gib(budget)}"
    if ways := list(_ways(settings, needs, sizes, memory)):
        return f"{what}. What would fit: {', or '.join(ways)}"
    if found.room_for_tokens(budget) >= length:  # or what is not in the estimate was too much
        return (
            f"{what}. That should fit: if another process has taken memory meanwhile, start again; "
            f"else lower engine.max_num_seqs (now {sizes[0]})"
        )
    return f"{what}. End what else runs there, or take a smaller model or a larger device"


def _had(memory: Memory) -> str:
    if memory.free_bytes == memory.total_bytes:  # of a device, if nobody used it
        return f"it has {gib(memory.total_bytes)}"
    return f"{gib(memory.free_bytes)} of {gib(memory.total_bytes)} were free"


def _ways(
    settings: VllmSettings, needs: Needs, sizes: tuple[int, int], memory: Memory
) -> Iterator[str]:
    """Settings with which one sequence of full length would fit; or how long one may be."""
    found = estimate_of(settings, needs, sizes)
    length = settings.max_model_len
    budget = budget_of(settings, memory)
    room = room_of(settings, found, memory)
    of_sequence = found.cache_bytes(length)
    needed = found.weights + found.step + of_sequence
    fixed = settings.options.get("kv_cache_memory_bytes")
    if 0 < room < length:
        yield f"model.max_model_len {room}"
    if isinstance(fixed, int):
        if fixed < of_sequence:
            yield f"engine.options.kv_cache_memory_bytes {of_sequence}"
        return
    if memory.is_gpu:
        asked = settings.gpu_memory_utilization or 0.0
        most = min(MOST_ASKED, math.floor(100 * _free_share(memory)) / 100)
        if needed <= budget and asked > most:  # others hold what was asked for
            yield f"engine.gpu_memory_utilization auto (now {most:.2f})"
        elif budget < needed <= most * memory.total_bytes - RESERVED_BYTES:
            yield f"engine.gpu_memory_utilization {most:.2f}"
    if needed <= budget:
        return
    left = budget - found.step - of_sequence
    num_seqs = _most_seqs(needs, sizes, budget - found.weights - of_sequence)
    if num_seqs is not None:
        yield f"engine.max_num_seqs {num_seqs}"
    if needs.packed is not None and needs.packed < needs.weights and needs.packed <= left:
        yield f"model.keep_packed auto ({gib(needs.packed)} of weights)"
    for name, num_bytes in needs.smaller.items():
        if num_bytes // settings.tensor_parallel_size <= left:
            yield f"model.quantization {name} ({gib(num_bytes)} of weights)"
            break
    if memory.is_gpu:
        for num_devices in (2, 4, 8):
            if num_devices <= settings.tensor_parallel_size or needs.num_heads % num_devices:
                continue
            shared = replace(settings, tensor_parallel_size=num_devices)
            other = estimate_of(shared, needs, sizes)
            if other.room_for_tokens(budget) >= length:
                yield f"model.tensor_parallel_size {num_devices}"
                break
        if needed - budget < found.weights:
            num_gib = math.ceil(settings.cpu_offload_gib + (needed - budget) / GIB)
            yield f"model.cpu_offload_gib {num_gib} (slower)"


def _most_seqs(needs: Needs, sizes: tuple[int, int], num_bytes: int) -> int | None:
    """The most sequences whose logits leave the rest of a step its room; None: they are not it."""
    of_tokens = needs.dequantized + sizes[1] * needs.step_per_token
    most = (num_bytes - needs.dequantized) // max(1, needs.logits_per_row)
    return most if 0 < most < sizes[0] and of_tokens <= num_bytes else None


def budget_of(settings: VllmSettings, memory: Memory) -> int:
    """Bytes for weights, a step and the KV cache: what is allowed, and free."""
    if not memory.is_gpu:
        return memory.free_bytes
    share = settings.gpu_memory_utilization
    share = _auto_share(memory) if share is None else share
    return max(0, min(int(share * memory.total_bytes), memory.free_bytes) - RESERVED_BYTES)


def room_of(settings: VllmSettings, found: Estimate, memory: Memory) -> int:
    """Tokens that the KV cache holds: in what is left, or in the size that the job gives it."""
    room = found.room_for_tokens(budget_of(settings, memory))
    fixed = settings.options.get("kv_cache_memory_bytes")
    return min(room, found.tokens_in(fixed)) if isinstance(fixed, int) else room


def _auto_share(memory: Memory) -> float:
    return min(MOST_UTILIZATION, math.floor(100 * _free_share(memory)) / 100)


def _free_share(memory: Memory) -> float:
    return (memory.free_bytes - RESERVED_BYTES) / memory.total_bytes
