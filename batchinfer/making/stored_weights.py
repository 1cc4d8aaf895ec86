"""The folder of an unquantized model as its quantized copy needs it: tensors, and all the rest.

A tensor at a time: memory is bounded by the largest one. Must not know: how weights are quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.errors import ConfigError
from batchinfer.making.tensor_files import TensorSpec

#: What belongs to a model besides its weights, as the hub's downloads take it.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
_INDEX_SUFFIX = ".index.json"

#: safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")


def copy_settings(source: Path, target: Path) -> None:
    """Tokenizer, templates, generation settings: everything but the weights and their index."""
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        if file.is_file() and not file.name.endswith(_INDEX_SUFFIX):
            shutil.copyfile(file, target / file.name)


def content_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ConfigError for a weight [out, in] with infinities or NaN: no scale holds them."""
    if not (is_finite := weight.isfinite()).all():
        row, column = (~is_finite).nonzero()[0].tolist()
        raise ConfigError(
            f"{name} has {int((~is_finite).sum()):,} values that are NaN or infinite, the first in "
            f"row {row}, column {column}: the model is damaged or was trained to that. Copy it "
            "again, or take another"
        )


class StoredWeights:
    """The tensors of a model's files, read one at a time.

    A file is mapped while one of its tensors lives: mapped for longer, what was read would stay in
    memory (2.6 GB of a file of 2.6 GB).
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.places: dict[str, tuple[Path, str, tuple[int, ...]]] = {}  # file, dtype, shape
        for file in files:
            with _safetensors(file), safe_open(file, "pt") as stream:
                for name in stream.keys():  # noqa: SIM118 - no mapping, it only looks like one
                    entry = stream.get_slice(name)
                    self.places[name] = (file, entry.get_dtype(), tuple(entry.get_shape()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self.places.items()}

    def num_bytes(self, name: str) -> int:
        _, dtype, shape = self.places[name]
        return TensorSpec(name, dtype, shape).num_bytes

    def read(self, name: str) -> Tensor:
        file, _, _ = self.places[name]
        with _safetensors(file):
            stream: Any = safe_open(file, "pt")
            return stream.get_tensor(name)


@contextmanager
def _safetensors(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        if file.suffix == ".safetensors":
            raise ConfigError(f"{file} cannot be read: {error}. Copy it again") from error
        raise ConfigError(
            f"{file} is not a safetensors file, and only those are quantized: save the model with "
            "transformers' save_pretrained first"
        ) from error
