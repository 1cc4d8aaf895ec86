"""The blocks of a model that are coded already, kept beside the folder that is being made.

One safetensors file for each, there as a whole or not at all: a process that is killed loses the
block it was at. They belong to one model, calibration and code, named by a key; with another key
all begins again. Must not know: what is coded, and how.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchinfer.storage.local_errors import os_errors

_KEY = "key"


class FinishedBlocks:
    """In `folder`. One process at a time. Raises ConfigError, TransientError (disk full)."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        with os_errors("write", folder):
            note = folder / _KEY
            if not note.exists() or note.read_bytes() != key.encode("ascii"):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                note.write_text(key, encoding="ascii")

    def read(self, block: str) -> dict[str, Tensor] | None:
        """Its tensors by name; None if it is not finished."""
        file = self._file(block)
        if not file.exists():
            return None
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError):  # damaged since: it is made again
            return None

    def write(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        file = self._file(block)
        temporary = file.with_suffix(".tmp")
        with os_errors("write", file):
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)

    def _file(self, block: str) -> Path:
        return self._folder / f"{block}.safetensors"
