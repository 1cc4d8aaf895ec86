"""safetensors files, written a tensor at a time: what a file will hold is said first.

The format is a header (JSON: dtype, shape, place of each tensor) and the tensors without gaps. With
the header known, each tensor goes to its place as soon as it is there, in any order, and none is
kept. Must not know: torch, what tensors mean. Invariant: a file ends with every tensor it was
planned with, or `close` fails.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from batchinfer.model.weights import DTYPE_BITS

#: As Hugging Face writes them: a model of more than this is several files and an index.
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class TensorFolder:
    """The weight files of a model: model.safetensors, or several and their index."""

    def __init__(
        self, folder: Path, specs: Iterable[TensorSpec], max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        files: list[list[TensorSpec]] = [[]]
        num_bytes = 0
        for spec in specs:
            if files[-1] and num_bytes + spec.num_bytes > max_file_bytes:
                files.append([])
                num_bytes = 0
            files[-1].append(spec)
            num_bytes += spec.num_bytes
        self._folder = folder
        self._files = []
        self._file_of: dict[str, _TensorFile] = {}
        for number, held in enumerate(files, 1):
            name = "model.safetensors"
            if len(files) > 1:
                name = f"model-{number:05}-of-{len(files):05}.safetensors"
            file = _TensorFile(folder / name, held)
            self._files.append(file)
            self._file_of |= {spec.name: file for spec in held}

    def write(self, name: str, content: memoryview) -> None:
        """Put a planned tensor, in C order, into its place."""
        self._file_of[name].write(name, content)

    def close(self) -> None:
        """Everything is on the disk, or an error says what is not."""
        for file in self._files:
            file.close()
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(file.data_bytes for file in self._files)},
                "weight_map": {name: file.path.name for name, file in self._file_of.items()},
            }
            path = self._folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=1))

    def abandon(self) -> None:
        """Close what is open; the files are worth nothing."""
        for file in self._files:
            file.abandon()


class _TensorFile:
    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.path = path
        # The widest types first: then each tensor lies at a multiple of its type's size, and can be
        # read where it is.
        ordered = sorted(specs, key=lambda spec: (-DTYPE_BITS[spec.dtype], spec.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}  # not written yet: offset, bytes
        self.data_bytes = 0
        for spec in ordered:
            end = self.data_bytes + spec.num_bytes
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [self.data_bytes, end],
            }
            self._places[spec.name] = (self.data_bytes, spec.num_bytes)
            self.data_bytes = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._first_byte = 8 + len(text)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, content: memoryview) -> None:
        offset, num_bytes = self._places.pop(name)
        assert content.nbytes == num_bytes, f"{name}: {content.nbytes} bytes, planned {num_bytes}"
        self._stream.seek(self._first_byte + offset)
        self._stream.write(content)

    def close(self) -> None:
        assert not self._places, f"{self.path.name} lacks {', '.join(self._places)}"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        self._stream.close()
