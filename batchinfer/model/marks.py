"""Whether weights are those of before, as far as times and a few bytes of each file show.

Asked at every start, so nothing is read of a file that nobody touched, and little of another: a
model that was trained on, or quantized again, has other bytes everywhere, and a copy has the same.
Must not know: what the weights are for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.weights import weight_files

_NUM_READS = 16
_READ_BYTES = 4096
_THREADS = 16


def weight_marks(folder: str) -> dict[str, Any]:
    """File -> its mark, of the weights in a folder; of a file that cannot be read none."""
    return dict(zip(*_looked_at(folder, {}), strict=True))


def changed_weights(folder: str, marks: Mapping[str, Any]) -> list[str]:
    """The files that hold other bytes than when they were marked. Others are not judged."""
    names, found = _looked_at(folder, marks)
    return [
        name
        for name, mark in zip(names, found, strict=True)
        if isinstance(was := marks.get(name), dict) and was.get("sample") != mark.get("sample")
    ]


def _looked_at(folder: str, known: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        files = weight_files(Path(folder))
    except ConfigError:  # whoever needs them says so
        return [], []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mark") as pool:
        marks = pool.map(lambda file: _mark(file, known.get(file.name)), files)
        found = [(file.name, mark) for file, mark in zip(files, marks, strict=True) if mark]
    return [name for name, _ in found], [mark for _, mark in found]


def _mark(file: Path, known: Any) -> dict[str, Any]:
    with suppress(OSError):
        was = file.stat()
        times = {"size": was.st_size, "mtime_ns": was.st_mtime_ns, "ctime_ns": was.st_ctime_ns}
        if isinstance(known, dict) and times.items() <= known.items():
            return dict(known)
        return times | {"sample": _sample(file, was.st_size)}
    return {}


def _sample(file: Path, size: int) -> str:
    """Digest of the size and of pieces at equal distances, the last of them at the end."""
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - _READ_BYTES)
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number in range(_NUM_READS):
            digest.update(os.pread(descriptor, _READ_BYTES, last * number // (_NUM_READS - 1)))
    finally:
        os.close(descriptor)
    return digest.hexdigest()
