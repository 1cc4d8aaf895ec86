"""Peaks of devices that the table does not have: measured once, and remembered below the cache.

What was measured is a lower bound: other processes may have been at work. A file that cannot be
read is measured again, one that cannot be written is done without. Must not know: how it is
measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.making.cached import user_cache
from batchinfer.verdict.peaks import Peaks, Precision, peaks_of_card

logger = logging.getLogger("batchinfer.verdict")

#: Operations a second in the model's dtype, bytes a second; None: it could not be measured.
Measure = Callable[[], tuple[float, float] | None]


def peaks_of(device: str, dtype: str, measure: Measure | None, engine: str) -> Peaks | None:
    """From the table, from an earlier measurement, or from `measure`; None: unknown.

    `engine`: whose library measures; what another's reaches says nothing of it.
    """
    if (found := peaks_of_card(device)) is not None:
        return found
    what = {"device": cpu_name() if device == "cpu" else device, "dtype": dtype, "engine": engine}
    path = _path(what)
    numbers = _read(path, what)
    if numbers is None and measure is not None:
        numbers = measure()
        if numbers is not None:
            logger.info("measured %s once in %s: %s", what["device"], dtype, _shown(*numbers))
            _write(path, what, numbers)
    if numbers is None:
        return None
    precision: Precision = "float32" if dtype == "float32" else "16 bit"
    return Peaks({precision: numbers[0]}, numbers[1], "measured")


def cpu_name() -> str:
    """With the number of cores that this process may use, which a measurement is of."""
    name = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model na"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _shown(flops_per_s: float, bytes_per_s: float) -> str:
    return f"{flops_per_s / 1e9:,.0f} GFLOP/s, {bytes_per_s / 1e9:,.1f} GB/s"


def _path(what: dict[str, str]) -> Path | None:
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    try:
        return user_cache() / "devices" / f"{name}.json"
    except ConfigError:  # no home folder
        return None


def _read(path: Path | None, what: dict[str, str]) -> tuple[float, float] | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
        numbers = float(found["flops_per_s"]), float(found["bytes_per_s"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    is_it = all(found.get(key) == value for key, value in what.items())
    return numbers if is_it and min(numbers) > 0 else None


def _write(path: Path | None, what: dict[str, str], numbers: tuple[float, float]) -> None:
    if path is None:
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**what, "flops_per_s": numbers[0], "bytes_per_s": numbers[1]}
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    except OSError as error:
        logger.debug("cannot remember what %s can do: %s", what["device"], error)
