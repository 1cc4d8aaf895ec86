"""The names of `model.kv_cache_dtype`: what keys and values of past tokens are stored in.

Facts of CPUs were measured with vLLM 0.32, those of GPUs with vLLM 0.26 on an H200; least compute
capabilities are those of vLLM's kernels. Must not know: weights, whole model folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization.machine import Machine
from batchinfer.quantization.words import dotted

#: The CPU attention's instruction set, and the numbers of a head that it converts at once.
_CPU_FLAG = "avx512f"
_CPU_HEAD_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class KvCacheDtype:
    """One name. `cpu_refused` and `gpu_refused` say why it does not run there; "" if it does."""

    name: str  # also vLLM's
    meaning: str
    bits: int  # of a stored number
    scale_bytes: int = 0  # of each key and each value of a head of a token
    cpu_refused: str = ""
    gpu_refused: str = ""
    min_capability: tuple[int, int] = (7, 5)


#: Measured: one wrong result for all three names, and no error.
_NO_CPU_SCALES = "vLLM has no CPU kernel for it, takes the name and computes something else"

KV_CACHE_TABLE: tuple[KvCacheDtype, ...] = (
    KvCacheDtype("fp8", "8-bit float, E4M3, scaled by tensor", 8, min_capability=(8, 9)),
    KvCacheDtype(
        "fp8_e5m2",
        "8-bit float, E5M2: more range, fewer digits",
        8,
        gpu_refused="vLLM's attention on a GPU fails with it; fp8 (E4M3) takes the same memory",
    ),
    KvCacheDtype(
        "fp8_per_token_head",
        "8-bit float, a scale for each token and head",
        8,
        scale_bytes=4,
        cpu_refused=_NO_CPU_SCALES,
        min_capability=(8, 9),
    ),
    KvCacheDtype(
        "int8_per_token_head",
        "8-bit integer, a scale for each token and head",
        8,
        scale_bytes=4,
        cpu_refused=_NO_CPU_SCALES,
    ),
    KvCacheDtype(
        "int4_per_token_head",
        "4-bit integer, a scale for each token and head",
        4,
        scale_bytes=4,
        cpu_refused=_NO_CPU_SCALES,
    ),
)


def kv_cache_record(name: str) -> KvCacheDtype:
    """The record of a name that the job's model allows, other than auto."""
    return next(record for record in KV_CACHE_TABLE if record.name == name)


def choose_kv_cache(
    asked: str, settings: Mapping[str, Any] | None, machine: Machine, head_size: int
) -> str:
    """The name that vLLM keeps the cache in: the one asked for, or under auto the checkpoint's.

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
    match machine.device:
        case "cpu":
            if record.cpu_refused:
                return record.cpu_refused
            if _CPU_FLAG not in machine.cpu_flags:
                return f"it needs a CPU with {_CPU_FLAG}, which this one lacks"
            if head_size is not None and head_size % _CPU_HEAD_MULTIPLE:
                return (
                    f"on a CPU it needs heads of a multiple of {_CPU_HEAD_MULTIPLE} numbers, the "
                    f"model's have {head_size}"
                )
        case "cuda":
            if record.gpu_refused:
                return record.gpu_refused
            capability = machine.compute_capability
            if capability and capability < record.min_capability:
                return (
                    f"it needs a GPU of compute capability {dotted(record.min_capability)}, this "
                    f"one has {dotted(capability)}"
                )
    return ""


def kv_cache_of(settings: Mapping[str, Any] | None) -> str:
    """What vLLM takes under auto for a checkpoint with these settings of its quantization.

    As vLLM 0.26 to 0.32 read them: of compressed-tensors, and of ModelOpt where weights are
    quantized too. What other families say of the cache is not looked at.
    """
    settings = settings or {}
    inner = settings.get("quantization")
    of_modelopt = inner if isinstance(inner, Mapping) else settings
    family = str(settings.get("quant_method") or "").lower()
    scheme = of_modelopt.get("kv_cache_scheme") or settings.get("kv_cache_scheme")
    is_float8 = isinstance(scheme, Mapping) and (scheme.get("num_bits"), scheme.get("type")) == (
        8,
        "float",
    )
    if family == "compressed-tensors":
        return "fp8" if is_float8 else "auto"
    if not of_modelopt.get("quant_algo") or not (not family or family.startswith("modelopt")):
        return "auto"
    algorithm = scheme or of_modelopt.get("kv_cache_quant_algo")
    if isinstance(algorithm, Mapping):
        return "fp8" if is_float8 and algorithm.get("dynamic") is False else "auto"
    return "fp8" if str(algorithm).lower() == "fp8" else "auto"


def kv_cache_markdown() -> str:
    """The table in docs/quantization.md."""
    lines = [
        "| name | what it is | bits | on a CPU | on a GPU |",
        "|---|---|---|---|---|",
        "| `auto` | `model.dtype`, or as the checkpoint says | 16 | yes | yes |",
    ]
    for record in KV_CACHE_TABLE:
        cpu = f"needs {_CPU_FLAG} and heads of a multiple of {_CPU_HEAD_MULTIPLE} numbers"
        gpu = f"needs compute capability {dotted(record.min_capability)}"
        cells = (
            f"`{record.name}`",
            record.meaning,
            str(record.bits),
            f"no: {record.cpu_refused}" if record.cpu_refused else cpu,
            f"no: {record.gpu_refused}" if record.gpu_refused else gpu,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
