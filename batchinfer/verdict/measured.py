"""Peaks of devices that the table does not have: measured once, and remembered below the cache.

What was measured is a lower bound: other processes may have been at work. Where they were, the next
runs measure again, a few times, and the best is kept. A file that cannot be read is measured again,
one that cannot be written is done without. Must not know: how it is measured.
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

#: On a machine that is always busy.
_MOST_TRIES = 4
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
    numbers, num_tries = _read(path, what)
    if num_tries < _MOST_TRIES and measure is not None and (now := measure()) is not None:
        # The better of both: what else runs only makes it slower.
        numbers = now if numbers is None else (max(numbers[0], now[0]), max(numbers[1], now[1]))
        logger.info("measured %s in %s: %s", what["device"], dtype, _shown(*numbers))
        _write(path, what, numbers, num_tries + 1)
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


def _read(path: Path | None, what: dict[str, str]) -> tuple[tuple[float, float] | None, int]:
    """The numbers, and how often they were measured."""
    if path is None:
        return None, 0
    try:
        found = json.loads(path.read_text())
        numbers = float(found["flops_per_s"]), float(found["bytes_per_s"])
        num_tries = int(found["num_tries"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, 0
    if any(found.get(key) != value for key, value in what.items()) or min(numbers) <= 0:
        return None, 0
    return numbers, num_tries


def _write(
    path: Path | None, what: dict[str, str], numbers: tuple[float, float], num_tries: int
) -> None:
    if path is None:
        return
    if os.getloadavg()[0] <= len(os.sched_getaffinity(0)):
        num_tries = _MOST_TRIES  # nobody was in the way: this is it
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = {"flops_per_s": numbers[0], "bytes_per_s": numbers[1], "num_tries": num_tries}
        temporary.write_text(json.dumps(what | measured))
        temporary.replace(path)
    except OSError as error:
        logger.debug("cannot remember what %s can do: %s", what["device"], error)
