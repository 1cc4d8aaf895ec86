"""What a machine has, as far as it decides which quantization can run on it: plain values.

Must not know: how they were found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """vLLM's kernels for the CPU at hand."""

    file: str
    instructions: str  # that it was built for, in words
    kernels: frozenset[str] | None  # operators that it registers; None: nothing is known of them


@dataclass(frozen=True, slots=True)
class Machine:
    """`device` is None where vLLM or its device is not there: then nothing is said about it."""

    device: Literal["cpu", "cuda"] | None
    compute_capability: tuple[int, int] | None = None  # of CUDA devices, the lowest
    cpu_flags: frozenset[str] = frozenset()  # as in /proc/cpuinfo
    packages: frozenset[str] = frozenset()  # installed, of those that a name needs
    library: CpuLibrary | None = None  # of a CPU; None: nothing is known of it
    engine: str = "vllm"  # whose table says what runs

    def lacks_kernel(self, kernel: str) -> str:
        """In words, that vLLM's library for this CPU has no such kernel; "" if it has, or may."""
        if self.library is None or self.library.kernels is None:
            return ""
        if not kernel or kernel in self.library.kernels:
            return ""
        return (
            f"needs the kernel {kernel}, which vLLM's library for this CPU lacks "
            f"({self.library.file}, for {self.library.instructions})"
        )
