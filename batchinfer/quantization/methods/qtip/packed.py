"""Whether a CPU computes with weights that stay packed, and what that takes.

A CPU decodes layers while they are loaded, unless the process is told to keep them packed. Must not
know: torch, the kernels themselves.
"""

from __future__ import annotations

import os

from batchinfer.native import user_folder, why_none
from batchinfer.quantization.methods.base import KEEP_PACKED

SOURCE = "cpu/linear.cpp"

_AVX2 = ("avx2", "fma", "f16c")
_OPTIONAL = ("avx512_bf16",)
_AVX512 = ("avx512f", "avx512bw", "avx512_vbmi2")


def is_asked() -> bool:
    """Of this process."""
    return os.environ.get(KEEP_PACKED, "0") not in ("", "0")


def flags_for(cpu_flags: frozenset[str]) -> tuple[str, ...]:
    """The compiler's options for a CPU with AVX2 or more."""
    wanted = [*_AVX2]
    if cpu_flags.issuperset(_AVX512):
        wanted += [*_AVX512, *(flag for flag in _OPTIONAL if flag in cpu_flags)]
    return tuple(f"-m{flag.replace('_', '')}" for flag in wanted)


def why_not_packed(cpu_flags: frozenset[str]) -> str | None:
    """Why a CPU that has these flags cannot compute with packed weights; None if it can."""
    if not cpu_flags.issuperset(_AVX2):
        return f"the kernels for packed weights need a CPU with {', '.join(_AVX2)}"
    return why_none(SOURCE, flags_for(cpu_flags), user_folder())
