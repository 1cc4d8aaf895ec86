"""From an unquantized model's folder to a quantized one, each weight rounded to nearest.

A tensor at a time: memory is bounded by the largest one, not by the model. The new files are
planned before anything is read: one weight of zeros of each shape says what becomes of it. Must not
know: where folders are, who else works on them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from batchinfer.errors import ConfigError
from batchinfer.making.layers import computed_together, linear_layers
from batchinfer.making.order import LayerCounts
from batchinfer.making.stored_weights import (
    DTYPE_NAMES,
    DTYPES,
    FLOATS,
    StoredWeights,
    check_finite,
    content_of,
    copy_settings,
)
from batchinfer.making.tensor_files import TensorFolder, TensorSpec
from batchinfer.model.folder import read_json
from batchinfer.model.weights import weight_files
from batchinfer.quantization import RECIPES, Recipe
from batchinfer.storage.local_errors import os_errors

#: (bytes of the model that are done, all bytes)
OnProgress = Callable[[int, int], None]


def round_to_nearest(
    source: Path, target: Path, recipe: Recipe, on_progress: OnProgress
) -> LayerCounts:
    """Write the model of `source` into `target`, an empty folder, quantized as `recipe` says.

    Raises ConfigError for a model that cannot be.
    """
    weights = StoredWeights(weight_files(source))
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
    return LayerCounts(len(layers), len(layers) + len(kept & {n[:-7] for n in weights.shapes}))


def _writer(recipe: Recipe) -> Any:
    """The method's module that rounds a weight; see `Recipe.write`."""
    assert recipe.write is not None
    return importlib.import_module(recipe.write)


def _plan(weights: StoredWeights, layers: set[str], recipe: Recipe) -> Iterator[TensorSpec]:
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
    zeros = torch.zeros(shape, dtype=DTYPES[dtype])
    parts = _writer(recipe).round_weight(zeros, recipe.preset, largest=1.0)
    return {name: (DTYPE_NAMES[part.dtype], tuple(part.shape)) for name, part in parts.items()}


def _fill(
    files: TensorFolder,
    weights: StoredWeights,
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
            files.write(name, content_of(weights.read(name)))
        else:
            if writer.uses_shared_scale(recipe.preset) and layer not in largest:
                group = computed_together(layer, layers)
                most = max(weights.read(f"{other}.weight").abs().max().item() for other in group)
                largest |= dict.fromkeys(group, float(most))
            weight = weights.read(name)
            check_finite(name, weight)
            parts = writer.round_weight(weight, recipe.preset, largest.get(layer))
            for part, tensor in parts.items():
                files.write(f"{layer}.{part}", content_of(tensor))
        done_bytes += weights.num_bytes(name)
        on_progress(done_bytes, total_bytes)


def _check_groups(weights: StoredWeights, layers: set[str], recipe: Recipe) -> None:
    size = _writer(recipe).group_size_of(recipe.preset) or 1
    for layer in sorted(layers):
        _, dtype, (_, num_in) = weights.places[f"{layer}.weight"]
        if num_in % size:
            raise ConfigError(
                f"{layer} has {num_in} inputs, which groups of {size} do not divide: scheme "
                f"{recipe.preset} cannot be made of this model; {_without_groups(recipe)} need no "
                "groups"
            )
        if dtype not in FLOATS:
            raise ConfigError(f"{layer} is stored as {dtype}: the model is already quantized")


def _without_groups(recipe: Recipe) -> str:
    """The methods of the same module whose scales are of whole rows or tensors."""
    others = [other for other in RECIPES.values() if other.write == recipe.write]
    size_of = _writer(recipe).group_size_of
    return " and ".join(other.method for other in others if not size_of(other.preset))


def _layer_of(tensor: str, layers: set[str]) -> str | None:
    layer = tensor.removesuffix(".weight")
    return layer if layer != tensor and layer in layers else None
