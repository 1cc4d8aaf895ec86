"""The GPUs of this machine, as their driver has it: without vLLM and torch, as it is wanted before
either is imported.

Must not know: what needs it.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

GIB = 1 << 30

_Capability = tuple[int, int]
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """What a process holds of a GPU; `used_bytes` None where the driver does not report it."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """`free_bytes`: what no process has taken, at the moment of the question.

    `processes`: those that the driver shows here; in a container often none of another's.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: _Capability
    label: str = "GPU 0"  # as nvidia-smi and CUDA_VISIBLE_DEVICES call it
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a device, or of the host, for which no share can be set (`is_gpu` False)."""

    total_bytes: int
    free_bytes: int
    is_gpu: bool = True


class _NvmlMemory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _NvmlProcess(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


_MOST_PROCESSES = 256
_NOT_AVAILABLE = 2**64 - 1


def gib(num_bytes: float) -> str:
    """For people."""
    if num_bytes < GIB / 10:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"


def gpus() -> list[Gpu]:
    """The visible CUDA devices; none without a driver or a device.

    From the driver's management library, which starts no CUDA context in this process.
    """
    with _nvml() as nvml:
        found = _of_visible(nvml, _gpu) if nvml is not None else []
        return [gpu for gpu in found if gpu is not None]


def gpu_joules() -> list[float]:
    """What each visible CUDA device has used since its driver was loaded; NaN: it does not say."""
    with _nvml() as nvml:
        found = _of_visible(nvml, _joules) if nvml is not None else []
        return [math.nan if joules is None else joules for joules in found]


def _of_visible(
    nvml: ctypes.CDLL, ask: Callable[[ctypes.CDLL, int | str], _Answer | None]
) -> list[_Answer | None]:
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    visible = _visible(count.value)
    found = [ask(nvml, which) for which in visible]
    if visible and None in found:  # named in a way that the driver's library does not know
        found = [ask(nvml, index) for index in range(count.value)]
    return found


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would name each visible device by, as it does or by index."""
    with _nvml() as nvml:
        count = ctypes.c_uint()
        if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        return [str(which) for which in _visible(count.value)]


@contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2():
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: ctypes.CDLL, which: int | str) -> ctypes.c_void_p | None:
    """A device by index or UUID."""
    handle = ctypes.c_void_p()
    if isinstance(which, int):
        is_missing = nvml.nvmlDeviceGetHandleByIndex_v2(which, ctypes.byref(handle))
    else:
        is_missing = nvml.nvmlDeviceGetHandleByUUID(which.encode(), ctypes.byref(handle))
    return None if is_missing else handle


def _joules(nvml: ctypes.CDLL, which: int | str) -> float | None:
    """NaN of a slice of a device (MIG): only the whole is metered."""
    handle, millijoules = _handle(nvml, which), ctypes.c_ulonglong()
    if handle is None:
        return None
    try:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return math.nan
    except AttributeError:  # a driver from before 2018
        return math.nan
    return millijoules.value / 1000


def _gpu(nvml: ctypes.CDLL, which: int | str) -> Gpu | None:
    """A device by index or UUID; of a MIG device the compute capability is its parent's."""
    handle, parent = _handle(nvml, which), ctypes.c_void_p()
    if handle is None:
        return None
    if nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle, ctypes.byref(parent)):
        parent = handle
    name, memory = ctypes.create_string_buffer(96), _NvmlMemory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if (
        nvml.nvmlDeviceGetName(parent, name, len(name))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        or nvml.nvmlDeviceGetCudaComputeCapability(parent, ctypes.byref(major), ctypes.byref(minor))
    ):
        return None
    return Gpu(
        name.value.decode(),
        memory.total,
        memory.free,
        (major.value, minor.value),
        label=f"GPU {which}",
        processes=_processes(nvml, handle),
    )


def _processes(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> tuple[GpuProcess, ...]:
    """Those that compute on the device; none where the driver may not or does not say."""
    count, found = ctypes.c_uint(_MOST_PROCESSES), (_NvmlProcess * _MOST_PROCESSES)()
    try:
        if nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), found):
            return ()
    except AttributeError:  # a driver from before 2021
        return ()
    return tuple(
        GpuProcess(entry.pid, None if entry.used == _NOT_AVAILABLE else entry.used)
        for entry in found[: count.value]
        if entry.pid  # 0: one of another container
    )


def _visible(count: int) -> list[int | str]:
    """What CUDA_VISIBLE_DEVICES leaves: indices, or UUIDs as it names them."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return list(range(count))
    names = [name.strip() for name in variable.split(",")]
    if names[0] in ("", "-1"):
        return []  # hidden
    return [int(name) if name.isdecimal() else name for name in names if name != "-1"]
