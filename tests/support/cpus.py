"""CPUs that this machine is not: plain Machines, and an environment in which it stands in for one.

In such a process vLLM loads the library of the CPU named (tests/support/other_cpu), and torch and
oneDNN, whose own variables are set, choose kernels of its instruction sets. To start one:

    python -m tests.support.cpus avx2 pytest tests/quantization/test_kv_cache.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from batchinfer.engine.vllm.machine import this_machine
from batchinfer.quantization import (
    CpuLibrary,
    Machine,
    for_this_machine,
    lacks_arithmetic,
    record_of,
)
from tests.support.other_cpu.sitecustomize import FLAGS

ROOT = Path(__file__).resolve().parents[2]

#: What vLLM's library for it has, of the kernels that the table asks for (vLLM 0.32).
LIBRARIES: Mapping[str, CpuLibrary] = {
    "avx2": CpuLibrary("_C_AVX2.abi3.so", "AVX2", frozenset({"onednn_scaled_mm"})),
    "avx512": CpuLibrary(
        "_C_AVX512.abi3.so", "AVX-512", frozenset({"onednn_scaled_mm", "cpu_gemm_wna16"})
    ),
    **dict.fromkeys(
        ("avx512_bf16", "amx"),
        CpuLibrary(
            "_C.abi3.so",
            "AVX-512 with bfloat16",
            frozenset({"onednn_scaled_mm", "cpu_gemm_wna16", "fp8_scaled_mm_cpu"}),
        ),
    ),
}
PACKAGES = frozenset({"compressed-tensors", "bitsandbytes"})
CPUS: Mapping[str, Machine] = {
    name: Machine("cpu", cpu_flags=flags, packages=PACKAGES, library=LIBRARIES[name], engine="vllm")
    for name, flags in FLAGS.items()
}

_VARIABLES: Mapping[str, Mapping[str, str]] = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


def runs_here(name: str) -> bool:
    """Whether this machine can run a name of `model.quantization`."""
    return for_this_machine(record_of(name), this_machine())[0]


#: Whether this machine's CPU computes in it, so that `model.dtype: auto` takes it.
HAS_BFLOAT16 = not lacks_arithmetic("bfloat16", this_machine())

#: For tests of what vLLM has no kernels for without AVX-512; the refusals of it are in
#: tests/engine/vllm/test_cpus.py.
needs_avx512 = pytest.mark.skipif(
    "avx512f" not in this_machine().cpu_flags, reason="vLLM has no kernels for it without AVX-512"
)


def environment(cpu: str) -> dict[str, str]:
    """What a child's environment needs so that it takes this machine for one with `cpu`.

    Only on the fake engine may that be one that has more than this machine.
    """
    path = os.pathsep.join([str(ROOT / "tests" / "support" / "other_cpu"), str(ROOT)])
    return {"STAND_IN_CPU": cpu, "PYTHONPATH": path, **_VARIABLES.get(cpu, {})}


if __name__ == "__main__":  # python -m tests.support.cpus CPU MODULE [ARGUMENT ...]
    cpu, *command = sys.argv[1:]
    os.execve(sys.executable, [sys.executable, "-m", *command], os.environ | environment(cpu))
