"""The names of `model.kv_cache_dtype`: what keys and values of past tokens are stored in.

Must not know: weights, whole model folders, what an engine can (`support`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization.machine import Machine
from batchinfer.quantization.methods import METHODS
from batchinfer.quantization.support import KvDevice, support_of
from batchinfer.quantization.words import dotted, markdown_item


@dataclass(frozen=True, slots=True)
class KvCacheDtype:
    """One name. How an engine keeps it on a device is in that engine's table (`support`)."""

    name: str
    meaning: str
    bits: int  # of a stored number
    scale_bytes: int = 0  # of each key and each value of a head of a token


KV_CACHE_TABLE: tuple[KvCacheDtype, ...] = (
    KvCacheDtype("fp8", "8-bit float, E4M3, scaled by tensor", 8),
    KvCacheDtype("fp8_e5m2", "8-bit float, E5M2: more range, fewer digits", 8),
    KvCacheDtype("fp8_per_token_head", "8-bit float, a scale for each token and head", 8, 4),
    KvCacheDtype("int8_per_token_head", "8-bit integer, a scale for each token and head", 8, 4),
    KvCacheDtype("int4_per_token_head", "4-bit integer, a scale for each token and head", 4, 4),
)


def kv_cache_record(name: str) -> KvCacheDtype:
    """The record of a name that the job's model allows, other than auto."""
    return next(record for record in KV_CACHE_TABLE if record.name == name)


def choose_kv_cache(
    asked: str, settings: Mapping[str, Any] | None, machine: Machine, head_size: int
) -> str:
    """The name that the cache is kept in: the one asked for, or under auto the checkpoint's.

    `settings` of the checkpoint's quantization. Raises ConfigError if this machine cannot keep the
    cache of heads of this size so.
    """

    def why_not(name: str) -> str:
        return kv_cache_why_not(kv_cache_record(name), machine, head_size) if name != "auto" else ""

    own = kv_cache_of(settings)
    found = own if asked == "auto" else asked
    if not (reason := why_not(found)):
        return found
    what = f"model.kv_cache_dtype {asked} cannot run here"
    if asked == "auto":
        what = f"the checkpoint keeps its KV cache in {own}, which cannot run here"
    names = [*(record.name for record in KV_CACHE_TABLE), *([] if asked == "auto" else ["auto"])]
    works = [name for name in names if not why_not(own if name == "auto" else name)]
    ways = [f"write model.kv_cache_dtype: {' or '.join(works)}"] if works else []
    if why_not(own):
        ways.append("give a checkpoint of the model that says nothing of the KV cache")
    advice = ", or ".join(ways)
    raise ConfigError(f"{what}: {reason}. {advice[0].upper()}{advice[1:]}")


def kv_cache_why_not(record: KvCacheDtype, machine: Machine, head_size: int | None) -> str:
    """What keeps this machine from it, in words; "" if nothing does, or nothing is known of it."""
    if machine.device is None:
        return ""
    device = _on(record, machine)
    if isinstance(device, str):
        return device
    if device.cpu_flag and device.cpu_flag not in machine.cpu_flags:
        return f"it needs a CPU with {device.cpu_flag}, which this one lacks"
    if head_size is not None and head_size % device.head_multiple:
        return (
            f"on a {machine.device.upper()} it needs heads of a multiple of {device.head_multiple} "
            f"numbers, the model's have {head_size}"
        )
    capability = machine.compute_capability
    if device.min_capability and capability and capability < device.min_capability:
        return (
            f"it needs a GPU of compute capability {dotted(device.min_capability)}, this one has "
            f"{dotted(capability)}"
        )
    return ""


def _on(record: KvCacheDtype, machine: Machine) -> KvDevice | str:
    return support_of(machine).kv_cache.get(record.name, "not yet in this version")


def kv_cache_of(settings: Mapping[str, Any] | None) -> str:
    """What auto is for a checkpoint with these settings of its quantization: what its method says
    that engines read in them.
    """
    settings = settings or {}
    family = str(settings.get("quant_method") or "").lower()
    said = (method.kv_cache_of(family, settings) for method in METHODS)
    return next((name for name in said if name != "auto"), "auto")


def kv_cache_markdown(engine: str) -> str:
    """The names in docs/quantization.md: what runs on this engine."""
    machines = (Machine("cpu", engine=engine), Machine("cuda", engine=engine))
    auto = "`auto`, 16 bits: `model.dtype`, or as the checkpoint says"
    items = [markdown_item(auto, "yes", "yes")]
    for record in KV_CACHE_TABLE:
        cpu, gpu = (_cell(_on(record, machine)) for machine in machines)
        what = f"`{record.name}`, {record.bits} bits: {record.meaning}"
        items.append(markdown_item(what, cpu, gpu))
    return "\n".join(items)


def _cell(device: KvDevice | str) -> str:
    if isinstance(device, str):
        return f"no: {device}"
    needs = [device.cpu_flag] if device.cpu_flag else []
    if device.min_capability:
        needs.append(f"compute capability {dotted(device.min_capability)}")
    if device.head_multiple > 1:
        needs.append(f"heads of a multiple of {device.head_multiple} numbers")
    return f"needs {' and '.join(needs)}" if needs else "yes"
