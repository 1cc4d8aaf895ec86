"""What a machine has, as far as it decides which quantization can run on it: plain values.

Must not know: how they were found out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """The engine's kernels for the CPU at hand."""

    file: str
    instructions: str  # that it was built for, in words
    kernels: frozenset[str] | None  # operators that it registers; None: nothing is known of them


@dataclass(frozen=True, slots=True)
class Machine:
    """`device` is None where the engine or its device is not there: then nothing is said of it."""

    device: Literal["cpu", "cuda"] | None
    compute_capability: tuple[int, int] | None = None  # of CUDA devices, the lowest
    cpu_flags: frozenset[str] = frozenset()  # as in /proc/cpuinfo
    packages: frozenset[str] = frozenset()  # installed, of those that a name needs
    library: CpuLibrary | None = None  # of a CPU; None: nothing is known of it
    #: A folder of batchinfer/engine, or another package by its dotted name: whose table it is.
    engine: str = field(kw_only=True)
