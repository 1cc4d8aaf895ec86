"""Widths that were found, remembered for this user below the cache folder.

A file for each kind of run: device, model, shape of the rows, engine and its sizes. Any may be
deleted at any time. One that cannot be read is ignored, and said; one that cannot be written is
done without. Must not know: how a width is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.engine.base import EngineFacts
from batchinfer.errors import ConfigError
from batchinfer.making.cached import user_cache
from batchinfer.verdict import cpu_name

logger = logging.getLogger("batchinfer.runner")

_FOUND = ("width", "gain", "completion_tokens")


@dataclass(frozen=True, slots=True)
class Remembered:
    """`gain`: over the widest. `completion_tokens`: mean of the rows that it was found on."""

    width: int
    gain: float
    completion_tokens: float


def kind_of_run(
    facts: EngineFacts,
    model: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    task: str,
    prompt_tokens: float,
    max_tokens: int | None,
) -> dict[str, Any]:
    """What a width is remembered by. `model`: what decides its results, see `Identity`.

    `prompt_tokens`: mean. `max_tokens`: most of a completion; None: it depends on the row.
    """
    running = facts.running
    return {
        "device": cpu_name() if facts.device == "cpu" else facts.device,
        "num_devices": running.num_devices,
        "engine": f"{facts.name} {facts.version}",
        "model": _digest(model),
        "dtype": facts.dtype,
        "quantization": facts.quantization,
        "kv_cache_dtype": running.kv_cache_dtype,
        "max_num_seqs": facts.max_num_seqs,
        "max_num_batched_tokens": facts.max_num_batched_tokens,
        "kv_cache_tokens": _bucket(facts.kv_cache_tokens),
        "graph_width": running.graph_width,
        "options": _digest(options),
        "task": task,
        "prompt_tokens": _bucket(prompt_tokens),
        "max_tokens": _bucket(max_tokens),
    }


class WidthMemory:
    """What is remembered of one kind of run."""

    def __init__(self, kind: Mapping[str, Any]) -> None:
        self._kind = dict(kind)
        self._path = _path(self._kind)

    def read(self) -> Remembered | None:
        """None: nothing, or nothing that can be read."""
        if self._path is None:
            return None
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("engine.tune: what earlier runs found is not read: %s", error)
            return None
        try:
            return _remembered(json.loads(text), self._kind)
        except (ValueError, TypeError) as error:
            logger.warning(
                "engine.tune: %s is ignored, as it is damaged (%s): the width is searched again, "
                "and the file replaced",
                self._path,
                error,
            )
            return None

    def write(self, found: Remembered) -> bool:
        """Whether it is remembered."""
        if self._path is None:
            return False
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        record = {
            **self._kind,
            "width": found.width,
            "gain": round(found.gain, 4),
            "completion_tokens": round(found.completion_tokens, 1),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(record, indent=1) + "\n")
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("engine.tune: the width cannot be remembered: %s", error)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False
        return True


def _remembered(record: Any, kind: Mapping[str, Any]) -> Remembered:
    """Raises ValueError, TypeError for what was not written here."""
    if not isinstance(record, dict) or not record.keys() >= {*kind, *_FOUND}:
        raise ValueError("something is missing")
    if any(record[key] != value for key, value in kind.items()):
        raise ValueError("it is of another kind of run")
    width, gain, mean = record["width"], float(record["gain"]), float(record["completion_tokens"])
    if type(width) is not int or not 1 <= width <= kind["max_num_seqs"]:
        raise ValueError(f"it names a width of {width!r}, of {kind['max_num_seqs']}")
    if not (math.isfinite(gain) and math.isfinite(mean)):
        raise ValueError("a number is not finite")
    return Remembered(width, gain, mean)


def _path(kind: Mapping[str, Any]) -> Path | None:
    try:
        return user_cache() / "widths" / f"{_digest(kind)}.json"
    except ConfigError:  # no home folder
        return None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _bucket(size: float | None) -> int | None:
    """The nearest power of two."""
    return None if size is None else 2 ** round(math.log2(max(1.0, size)))
