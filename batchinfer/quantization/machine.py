"""What a machine has, as far as it decides which quantization can run on it: plain values.

Must not know: how they were found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Machine:
    """`device` is None where vLLM or its device is not there: then nothing is said about it."""

    device: Literal["cpu", "cuda"] | None
    compute_capability: tuple[int, int] | None = None  # of CUDA devices, the lowest
    cpu_flags: frozenset[str] = frozenset()  # as in /proc/cpuinfo
    packages: frozenset[str] = frozenset()  # installed, of those that a name needs
