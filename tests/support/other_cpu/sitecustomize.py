"""Makes this process, and those it starts, take the machine for one with a lesser CPU.

Python imports it by itself where this folder is in PYTHONPATH and STAND_IN_CPU names a CPU of
`tests.support.cpus`. Both who are asked what the CPU has answer with less: torch, after which vLLM
chooses its library, and our own reading of /proc/cpuinfo. What it shows is which kernels are there
and chosen, not the speed of such a CPU. Imports neither torch nor batchinfer.
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

#: CPU -> instruction sets that it lacks: all whose names begin so.
_LACKS = {"avx2": ("avx512", "avx_vnni", "avx10", "amx"), "avx512": ("avx512_bf16", "amx")}


def _patch_torch(module: ModuleType, lacks: tuple[str, ...]) -> None:
    all_capabilities: Any = module.__dict__["get_capabilities"]

    def get_capabilities() -> MappingProxyType[str, Any]:
        found = dict(all_capabilities())
        return MappingProxyType(found | {n: False for n in found if n.startswith(lacks)})

    module.__dict__["get_capabilities"] = get_capabilities


def _patch_hardware(module: ModuleType, lacks: tuple[str, ...]) -> None:
    all_flags: Any = module.__dict__["cpu_flags"]
    module.__dict__["cpu_flags"] = lambda: frozenset(
        flag for flag in all_flags() if not flag.startswith(lacks)
    )


_PATCHES: dict[str, Callable[[ModuleType, tuple[str, ...]], None]] = {
    "torch.cpu": _patch_torch,
    "batchinfer.engine.hardware": _patch_hardware,
}


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, lacks: tuple[str, ...]) -> None:
        self._lacks = lacks
        self._left = dict(_PATCHES)

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
            patch(module, self._lacks)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _cpu := os.environ.get("STAND_IN_CPU"):
    sys.meta_path.insert(0, _PatchAfterImport(_LACKS[_cpu]))
