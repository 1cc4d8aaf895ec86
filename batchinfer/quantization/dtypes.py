"""What `model.dtype: auto` computes in: the checkpoint's dtype, where this machine is fast in it.

A CPU without arithmetic of a dtype computes it at a fraction of float32's rate
(docs/quantization.md). Must not know: files, engines, what a quantization allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from batchinfer.quantization.machine import Machine

#: Dtype -> instruction sets (/proc/cpuinfo) any of which computes in it.
_ARITHMETIC: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}
)


@dataclass(frozen=True, slots=True)
class Begun:
    """What an output's results were computed in, as its job.json says: names that `auto` may mean.

    `quantization` is "none" for an unquantized model.
    """

    dtype: str
    quantization: str

    def __str__(self) -> str:
        quantized = "" if self.quantization == "none" else f" with quantization {self.quantization}"
        return f"{self.dtype}{quantized}"


def lacks_arithmetic(dtype: str, machine: Machine) -> str:
    """In words, that this CPU has none of a dtype, so that it is slow; "" if it has, or may."""
    needed = _ARITHMETIC.get(dtype, ())
    is_known = machine.device == "cpu" and machine.cpu_flags  # on x86-64
    if not is_known or not needed or machine.cpu_flags.intersection(needed):
        return ""
    return f"this CPU has no {dtype} arithmetic ({' or '.join(needed)})"


def auto_dtype(own: str, machine: Machine) -> tuple[str, str]:
    """The dtype that `auto` takes for weights in `own`, and the reason; "" where it is `own`.

    float32 holds every number of both halves, so nothing of the checkpoint is lost by it.
    """
    if own == "float32":
        if lacks_arithmetic("bfloat16", machine):
            return own, ""
        return "bfloat16", "the checkpoint is float32, and model.dtype: float32 keeps it"
    if slow := lacks_arithmetic(own, machine):
        return "float32", f"the checkpoint is {own}, in which it is slow here: {slow}"
    return own, ""
