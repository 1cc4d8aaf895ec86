"""QTIP's own published models, in the format that is run here: the same weights, rewritten.

Their config.json has `quip_params` and no quantization_config. A layer at a time is read and
written. Safetensors only: pickles of weights are not opened. Must not know: how a layer is
converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from batchinfer.errors import ConfigError
from batchinfer.making.stored_weights import copy_settings
from batchinfer.making.tensor_files import TensorFolder, TensorSpec
from batchinfer.model.folder import read_json
from batchinfer.model.weights import read_header, weight_files
from batchinfer.quantization.methods.qtip import relaxml
from batchinfer.quantization.methods.qtip.recipes import AUTHORS_KEY
from batchinfer.storage.local_errors import os_errors

#: Of Hadamard matrices that the checkpoint does not hold, `had_12` and so on.
_MATRICES = "hadamard.safetensors"
_PARTS = ("trellis", "SU", "SV", "tlut", "rcp", "tp_rank")
_DTYPES = {"trellis": "I16", "suh": "F16", "svh": "F32", "tlut": "F16", "had_in": "I8"}

#: (layers that are done, all of them)
OnProgress = Callable[[int, int], None]


def convert(source: Path, target: Path, on_progress: OnProgress) -> int:
    """Write the model of `source` into `target`, an empty folder. Gives the number of its layers.

    Raises ConfigError for what cannot be converted.
    """
    config = read_json(source / "config.json", "a model folder needs it")
    if unknown := relaxml.unknown_params(config.pop(AUTHORS_KEY)):
        raise ConfigError(f"{source}: config.json has {AUTHORS_KEY} with {unknown}")
    places = _places(source)
    layers = _layers(places)
    if not layers:
        raise ConfigError(
            f"{source} has {AUTHORS_KEY} in config.json, and no trellis: copy it again"
        )
    specs = list(_plan(places, layers))
    bits = {spec.name.removesuffix(".trellis"): spec.shape[2] // 16 for spec in specs
            if spec.name.endswith(".trellis")}  # fmt: skip
    config["quantization_config"] = relaxml.settings(bits)
    matrices = _matrices(source)
    with os_errors("write", target):
        copy_settings(source, target)
        (target / "config.json").write_text(json.dumps(config, indent=2))
        files = TensorFolder(target, specs)
        try:
            _fill(files, places, layers, matrices, on_progress)
            files.close()
        except BaseException:
            files.abandon()
            raise
    return len(layers)


def _places(source: Path) -> dict[str, tuple[Path, TensorSpec]]:
    """Each tensor's file, dtype and shape."""
    found = {}
    for file in weight_files(source):
        if file.suffix != ".safetensors":
            raise ConfigError(f"{file} is not a safetensors file: convert it to one first")
        if file.name != _MATRICES:
            for name, tensor in read_header(file)[1].items():
                found[name] = (file, TensorSpec(name, tensor.dtype, tensor.shape))
    return found


def _layers(places: Mapping[str, tuple[Path, TensorSpec]]) -> dict[str, list[str]]:
    """Layer -> those of its tensors that are converted."""
    layers = [name.removesuffix(".trellis") for name in places if name.endswith(".trellis")]
    return {layer: [part for part in _PARTS if f"{layer}.{part}" in places] for layer in layers}


def _plan(
    places: Mapping[str, tuple[Path, TensorSpec]], layers: Mapping[str, list[str]]
) -> Iterator[TensorSpec]:
    taken = {f"{layer}.{part}" for layer, parts in layers.items() for part in parts}
    yield from (spec for name, (_, spec) in places.items() if name not in taken)
    for layer, parts in layers.items():
        if lost := [part for part in ("SU", "SV", "tlut") if part not in parts]:
            raise ConfigError(f"{layer} has a trellis and no {lost[0]}: copy the model again")
        shape, num_in, num_out = (
            places[f"{layer}.{part}"][1].shape for part in ("trellis", "SU", "SV")
        )
        try:
            shapes = relaxml.shapes(shape, num_in[0], num_out[0])
        except ValueError as error:
            raise ConfigError(f"{layer}: {error}") from error
        for part, part_shape in shapes.items():
            yield TensorSpec(f"{layer}.{part}", _DTYPES.get(part, "I8"), part_shape)


def _fill(
    files: TensorFolder,
    places: Mapping[str, tuple[Path, TensorSpec]],
    layers: Mapping[str, list[str]],
    matrices: Mapping[int, Tensor],
    on_progress: OnProgress,
) -> None:
    taken = {f"{layer}.{part}" for layer, parts in layers.items() for part in parts}
    for name in places:
        if name not in taken:
            files.write(name, _content(_read(places, name)))
    for number, (layer, parts) in enumerate(layers.items(), 1):
        tensors = {part: _read(places, f"{layer}.{part}") for part in parts}
        try:
            converted = relaxml.convert_layer(tensors, matrices)
        except ValueError as error:
            raise ConfigError(f"{layer}: {error}") from error
        for part, tensor in converted.items():
            files.write(f"{layer}.{part}", _content(tensor))
        on_progress(number, len(layers))


def _matrices(source: Path) -> dict[int, Tensor]:
    file = source / _MATRICES
    if not file.exists():
        return {}
    with safe_open(file, "pt") as stream:
        names = [name for name in stream.keys() if name.startswith("had_")]  # noqa: SIM118
        return {int(name.removeprefix("had_")): stream.get_tensor(name) for name in names}


def _read(places: Mapping[str, tuple[Path, TensorSpec]], name: str) -> Tensor:
    stream: Any = safe_open(places[name][0], "pt")  # mapped while the tensor lives, not longer
    return stream.get_tensor(name)


def _content(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
