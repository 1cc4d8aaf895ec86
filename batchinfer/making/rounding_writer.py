"""From an unquantized model's folder to a quantized one, each weight rounded to nearest.

A tensor at a time: memory is bounded by the largest one, not by the model. The new files are
planned before anything is read: one weight of zeros of each shape says what becomes of it. Must not
know: where folders lie, who else works on them.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.errors import ConfigError
from batchinfer.making.layers import computed_together, linear_layers
from batchinfer.making.tensor_files import TensorFolder, TensorSpec
from batchinfer.model.folder import read_json
from batchinfer.model.weights import weight_files
from batchinfer.quantization import Recipe
from batchinfer.storage.local_errors import os_errors

#: (bytes of the model that are done, all bytes)
OnProgress = Callable[[int, int], None]

#: What belongs to a model besides its weights, as the hub's downloads take it.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
_INDEX_SUFFIX = ".index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Made:
    num_quantized: int  # linear layers
    num_linear: int


def round_to_nearest(source: Path, target: Path, recipe: Recipe, on_progress: OnProgress) -> Made:
    """Write the model of `source` into `target`, an empty folder, quantized as `recipe` says.

    Raises ConfigError for a model that cannot be.
    """
    weights = _Weights(weight_files(source))
    layers, kept = linear_layers(source, weights.shapes)
    _check_groups(weights, layers, recipe)
    with os_errors("write", target):
        copy_settings(source, target)
        config = read_json(source / "config.json", "a model folder needs it")
        config["quantization_config"] = _writer(recipe).settings_of(recipe.preset, sorted(kept))
        (target / "config.json").write_text(json.dumps(config, indent=2))
        files = TensorFolder(target, _plan(weights, layers, recipe))
        try:
            _fill(files, weights, layers, recipe, on_progress)
            files.close()
        except BaseException:
            files.abandon()
            raise
    return Made(len(layers), len(layers) + len(kept & {n[:-7] for n in weights.shapes}))


def _writer(recipe: Recipe) -> Any:
    """The method's module that rounds a weight; see `Recipe.write`."""
    return importlib.import_module(recipe.write)


def copy_settings(source: Path, target: Path) -> None:
    """Tokenizer, templates, generation settings: everything but the weights and their index."""
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        if file.is_file() and not file.name.endswith(_INDEX_SUFFIX):
            shutil.copyfile(file, target / file.name)


def _plan(weights: _Weights, layers: set[str], recipe: Recipe) -> Iterator[TensorSpec]:
    for name, (_, dtype, shape) in weights.places.items():
        layer = _layer_of(name, layers)
        if layer is None:
            yield TensorSpec(name, dtype, shape)
            continue
        for part, (part_dtype, part_shape) in _rounded_shapes(dtype, shape, recipe).items():
            yield TensorSpec(f"{layer}.{part}", part_dtype, part_shape)


@cache
def _rounded_shapes(
    dtype: str, shape: tuple[int, ...], recipe: Recipe
) -> dict[str, tuple[str, tuple[int, ...]]]:
    zeros = torch.zeros(shape, dtype=_DTYPES[dtype])
    parts = _writer(recipe).round_weight(zeros, recipe.preset, largest=1.0)
    return {name: (_DTYPE_NAMES[part.dtype], tuple(part.shape)) for name, part in parts.items()}


def _fill(
    files: TensorFolder,
    weights: _Weights,
    layers: set[str],
    recipe: Recipe,
    on_progress: OnProgress,
) -> None:
    writer = _writer(recipe)
    total_bytes = sum(weights.num_bytes(name) for name in weights.places)
    done_bytes = 0
    largest: dict[str, float] = {}  # by layer; those of layers computed together are equal
    for name in weights.places:
        layer = _layer_of(name, layers)
        if layer is None:
            files.write(name, _content(weights.read(name)))
        else:
            if writer.uses_shared_scale(recipe.preset) and layer not in largest:
                group = computed_together(layer, layers)
                most = max(weights.read(f"{other}.weight").abs().max().item() for other in group)
                largest |= dict.fromkeys(group, float(most))
            parts = writer.round_weight(weights.read(name), recipe.preset, largest.get(layer))
            for part, tensor in parts.items():
                files.write(f"{layer}.{part}", _content(tensor))
        done_bytes += weights.num_bytes(name)
        on_progress(done_bytes, total_bytes)


def _check_groups(weights: _Weights, layers: set[str], recipe: Recipe) -> None:
    size = _writer(recipe).group_size_of(recipe.preset) or 1
    for layer in sorted(layers):
        _, dtype, (_, num_in) = weights.places[f"{layer}.weight"]
        if num_in % size:
            raise ConfigError(
                f"{layer} has {num_in} inputs, which groups of {size} do not divide: scheme "
                f"{recipe.preset} cannot be made of this model; int8 and fp8 need no groups"
            )
        if dtype not in _FLOATS:
            raise ConfigError(f"{layer} is stored as {dtype}: the model is already quantized")


def _layer_of(tensor: str, layers: set[str]) -> str | None:
    layer = tensor.removesuffix(".weight")
    return layer if layer != tensor and layer in layers else None


def _content(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class _Weights:
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
