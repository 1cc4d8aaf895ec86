"""Makes this process, and those it starts, take the machine for one with another CPU.

Python imports it by itself where this folder is in PYTHONPATH; STAND_IN_CPU names the CPU. Both who
are asked what the CPU has are patched: torch, after which vLLM chooses its library, says no to what
the other one lacks; our own reading of /proc/cpuinfo says what the other one has. So a lesser CPU
is stood in for with all of vLLM, a better one only where no kernel runs. What it shows is which
kernels are there and chosen, not the speed of such a CPU. STAND_IN_ONLY_TO names one of the two,
which then disagree. Imports neither torch nor batchinfer.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw"}
#: CPU -> its instruction sets, as far as anything asks for them.
FLAGS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512 | {"avx512_bf16"},
    "amx": _AVX512 | {"avx512_vbmi2", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"},
}
#: CPU -> how names of capabilities begin, as torch has them, that it lacks.
_LACKS = {
    "avx2": ("avx512", "avx10", "avx_vnni", "amx"),
    "avx512": ("avx512_bf16", "avx512_fp16", "avx10", "amx"),
    "avx512_bf16": ("avx512_fp16", "amx"),
    "amx": (),
}


def _patch_torch(module: ModuleType, cpu: str) -> None:
    all_capabilities: Any = module.__dict__["get_capabilities"]

    def get_capabilities() -> MappingProxyType[str, Any]:
        found = dict(all_capabilities())
        return MappingProxyType(found | {n: False for n in found if n.startswith(_LACKS[cpu])})

    module.__dict__["get_capabilities"] = get_capabilities


def _patch_native(module: ModuleType, cpu: str) -> None:
    module.__dict__["cpu_flags"] = lambda: FLAGS[cpu]


_PATCHES: dict[str, Callable[[ModuleType, str], None]] = {
    "torch.cpu": _patch_torch,
    "batchinfer.native": _patch_native,
}


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, cpu: str) -> None:
        self._cpu = cpu
        only = os.environ.get("STAND_IN_ONLY_TO", "").split()
        self._left = {name: _PATCHES[name] for name in only or _PATCHES}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self._left.pop(fullname, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module, self._cpu)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _cpu := os.environ.get("STAND_IN_CPU"):
    sys.meta_path.insert(0, _PatchAfterImport(_cpu))
