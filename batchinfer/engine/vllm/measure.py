"""What the device reaches in a product of matrices and in a copy, measured with torch in a moment.

For CPUs, and for cards that no table has. The best of several, as other processes only make it
slower. Must not know: engines, models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from batchinfer.engine.hardware import GIB
from batchinfer.engine.host import available_memory_bytes

_NUM_REPEATS = 5
_MOST_S = 0.3  # for each of the two
#: Larger than the caches of a CPU; a GPU computes for long enough to be told from its launch.
_SIDE = {"cpu": 1024, "cuda": 4096}
_COPIED_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}


def measure_device(dtype: str) -> tuple[float, float] | None:
    """Operations a second in `dtype`, and bytes a second, read and written. None: no room."""
    import torch

    if available_memory_bytes() < GIB:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, num_bytes = _SIDE[device], _COPIED_BYTES[device]
    wait = torch.cuda.synchronize if device == "cuda" else _no_wait
    try:
        with torch.inference_mode():
            product_s = _product_s(side, getattr(torch, dtype), device, wait)
            copy_s = _copy_s(num_bytes, device, wait)
    except RuntimeError:  # out of memory
        return None
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # what it keeps may be short later
    return 2.0 * side**3 / product_s, 2.0 * num_bytes / copy_s


def _product_s(side: int, dtype: Any, device: str, wait: Callable[[], None]) -> float:
    import torch

    factor = torch.ones((side, side), dtype=dtype, device=device)
    product = torch.empty_like(factor)
    return _best_s(lambda: torch.mm(factor, factor, out=product), wait)


def _copy_s(num_bytes: int, device: str, wait: Callable[[], None]) -> float:
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best_s(lambda: target.copy_(source), wait)


def _no_wait() -> None:
    """A CPU is done when the call returns."""


def _best_s(work: Callable[[], object], wait: Callable[[], None]) -> float:
    work()  # the first one also chooses kernels and touches pages
    wait()
    begun_s, best_s = time.perf_counter(), float("inf")
    for _ in range(_NUM_REPEATS):
        before_s = time.perf_counter()
        work()
        wait()
        now_s = time.perf_counter()
        best_s = min(best_s, now_s - before_s)
        if now_s - begun_s > _MOST_S:
            break
    return best_s
