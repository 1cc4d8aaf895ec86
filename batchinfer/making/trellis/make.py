"""From an unquantized model's folder to one of trellis-coded weights, block by block.

Linear layers whose sizes 128 does not divide stay as they are, with those that are computed as one
with them; so do heads and embeddings. Must not know: where folders are, who else works on them.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchinfer.errors import ConfigError, InputError, TransientError
from batchinfer.making.layers import computed_together, linear_layers
from batchinfer.making.order import LayerCounts, Reporter
from batchinfer.making.stored_weights import (
    DTYPE_NAMES,
    FLOATS,
    StoredWeights,
    check_finite,
    content_of,
    copy_settings,
)
from batchinfer.making.tensor_files import TensorFolder, TensorSpec
from batchinfer.making.trellis.blocks import Blocks, blocks_of
from batchinfer.making.trellis.finished import FinishedBlocks
from batchinfer.making.trellis.ldlq import CodedParts, Coder, code_layers
from batchinfer.making.trellis.viterbi import Search, search_on_cpu
from batchinfer.making.trellis.viterbi_cuda import search_on_gpu
from batchinfer.model.folder import read_json
from batchinfer.model.weights import weight_files
from batchinfer.quantization.methods.qtip.codes import CODES, gaussian_tlut, table
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.hadamard import BLOCK
from batchinfer.quantization.methods.qtip.trellis import TILE_WEIGHTS
from batchinfer.storage.local_errors import os_errors

#: Of a sequence that calibration goes through: texts are put one after the other.
_MAX_TOKENS = 2048
_MOST_BITS_OF_HYB = 4
#: Of a layer's loss: nothing is left of it. The coarsest coding has 0.3.
_LOST = 0.9
_PARTS = ("trellis", "suh", "svh", "tlut")


@dataclass(frozen=True, slots=True)
class Coding:
    """What is made: `num_bits` a weight, in one of the codes, calibrated with `texts` if any."""

    num_bits: int
    code: str
    texts: Sequence[str]
    max_tokens: int = _MAX_TOKENS


@dataclass(frozen=True, slots=True)
class Places:
    finished: Path  # of blocks that are done: with them a killed process continues
    key: str  # names the model, the coding and the texts; finished blocks of another are deleted
    libraries: Path  # of compiled C++


def _device() -> torch.device:
    """Where models are coded: on a GPU if torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def code_model(
    source: Path,
    target: Path,
    coding: Coding,
    places: Places,
    cpu_flags: frozenset[str],
    reporter: Reporter,
) -> LayerCounts:
    """Write the model of `source` into `target`, an empty folder.

    On the GPU if torch sees one. Raises ConfigError for a model that cannot be coded, InputError
    for too short texts, TransientError if a GPU's memory does not do.
    """
    if coding.code == "hyb" and coding.num_bits > _MOST_BITS_OF_HYB:
        raise ConfigError(
            f"--code hyb has 1,024 pairs of weights, and more than {_MOST_BITS_OF_HYB} bits do not "
            "make it more accurate: take another --code, such as mcg"
        )
    weights = StoredWeights(weight_files(source))
    layers, kept = linear_layers(source, weights.shapes)
    groups = _groups(weights, layers, reporter)
    coded = {layer for group in groups for layer in group}
    tokens = _tokens(source, coding, reporter, max(weights.shapes[f"{n}.weight"][1] for n in coded))
    finished = FinishedBlocks(places.finished, places.key)
    tlut = gaussian_tlut() if coding.code == "hyb" else None
    values = table(coding.code, tlut).float()
    progress = _Progress(reporter, sum(_size(weights, layer) for layer in coded))
    device = _device()
    if device.type == "cuda":
        search = search_on_gpu(values, coding.num_bits, places.libraries)
    else:
        search = search_on_cpu(values, coding.num_bits, cpu_flags, places.libraries)
    maker = _Maker(
        Coder(progress.counting(search), values.to(device), coding.num_bits),
        coding.code,
        tlut,
        finished,
        groups,
        progress,
    )
    names = blocks_of(coded)
    try:
        blocks = Blocks(source, names, tokens, device)
        for number, name in enumerate(names, 1):
            maker.make(blocks, name, f"{number} of {len(names)}")
    except torch.OutOfMemoryError as error:
        raise TransientError(
            f"the GPU has too little free memory to code {source}: free some, or code on the CPU "
            "(CUDA_VISIBLE_DEVICES set to nothing). What is finished is kept"
        ) from error
    _write(source, target, weights, coded, (layers - coded) | kept, coding, finished)
    stored = {name.removesuffix(".weight") for name in weights.shapes}
    return LayerCounts(len(coded), len(layers | (kept & stored)))


def _groups(weights: StoredWeights, layers: set[str], reporter: Reporter) -> list[list[str]]:
    """The layers to be coded, those that are computed as one together."""
    groups: list[list[str]] = []
    for layer in sorted(layers):
        _, dtype, _ = weights.places[f"{layer}.weight"]
        if dtype not in FLOATS:
            raise ConfigError(f"{layer} is stored as {dtype}: the model is already quantized")
        if ".experts." in layer:
            raise ConfigError(
                f"{layer} is one of many experts, which qtip does not code: take another --method"
            )
        if not any(layer in group for group in groups):
            groups.append(computed_together(layer, layers))
    found = []
    for group in groups:
        sizes = {size for layer in group for size in weights.shapes[f"{layer}.weight"]}
        why = "it is in no block" if not blocks_of(group) else ""
        if odd := [size for size in sorted(sizes) if size % BLOCK]:
            why = f"{BLOCK} does not divide {odd[0]}"
        if why:
            reporter.note(f"{', '.join(group)}: unquantized, as {why}")
        else:
            found.append(group)
    if not found:
        raise ConfigError(
            f"no linear layer has sizes that {BLOCK} divides, which qtip needs: take another "
            "--method, such as int4"
        )
    return found


def _tokens(source: Path, coding: Coding, reporter: Reporter, num_inputs: int) -> Tensor:
    """Calibration tokens, int64 [sequences, tokens], none without texts.

    At least as many as the widest coded layer has inputs, or their moments say nothing of some.
    """
    if not coding.texts:
        reporter.note(
            "no calibration texts: every input of a layer counts equally, which costs quality most "
            "at 2 bits; --calibration and --column name some"
        )
        return torch.empty(0, 0, dtype=torch.int64)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    rows = tokenizer(list(coding.texts), verbose=False)["input_ids"]
    if num_long := sum(len(row) > _MAX_TOKENS for row in rows):
        reporter.note(f"of the texts, the first {_MAX_TOKENS:,} tokens of {num_long:,} longer rows")
    ids = [token for row in rows for token in row[:_MAX_TOKENS]]
    if len(ids) < num_inputs:
        raise InputError(
            f"the calibration texts have {len(ids):,} tokens in {len(coding.texts):,} rows, and "
            f"{num_inputs:,} are needed, as many as the widest layer has inputs; 16 times as many "
            "are better: give more rows, or none"
        )
    length = min(coding.max_tokens, _MAX_TOKENS, len(ids))
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole]).view(-1, length)


class _Maker:
    def __init__(
        self,
        coder: Coder,
        code: str,
        tlut: Tensor | None,
        finished: FinishedBlocks,
        groups: list[list[str]],
        progress: _Progress,
    ) -> None:
        self._coder = coder
        self._code = code
        self._tlut = tlut
        self._finished = finished
        self._groups = groups
        self._progress = progress

    def make(self, blocks: Blocks, name: str, which: str) -> None:
        """Code the block that comes next, or find it finished; then go through it."""
        groups = [group for group in self._groups if blocks_of(group) == [name]]
        layers = [layer for group in groups for layer in group]
        tensors = self._finished.read(name)
        wanted = {f"{layer}.{part}" for layer in layers for part in _PARTS[:3]}
        if tensors is None or not wanted <= tensors.keys():
            begun_s = time.monotonic()
            moments = blocks.moments(name, [group[0] for group in groups])
            tensors, losses = {}, []
            for group in groups:
                weights = [blocks.weight(layer) for layer in group]
                for layer, weight in zip(group, weights, strict=True):
                    check_finite(f"{layer}.weight", weight)
                parts = code_layers(
                    weights,
                    moments.get(group[0]),
                    self._coder,
                    zlib.crc32(group[0].encode()),
                )
                for layer, part in zip(group, parts, strict=True):
                    if part.loss > _LOST:
                        self._progress.note(
                            f"{layer} is lost: its weights are too small beside those that it is "
                            "computed with for scales in float16"
                        )
                    tensors |= self._tensors(layer, part)
                    losses.append(f"{layer.removeprefix(name)[1:]} {part.loss:.4f}")
            self._finished.write(name, tensors)
            took_s = time.monotonic() - begun_s
            self._progress.note(f"block {which} in {took_s:.1f} s; loss: {', '.join(losses)}")
        else:
            self._progress.note(f"block {which} was finished before")
        blocks.replace(name, {layer: self._dense(layer, tensors) for layer in layers})
        tiles = (tensors[f"{layer}.trellis"].shape[:2] for layer in layers)
        self._progress.reach(sum(TILE_WEIGHTS * rows * columns for rows, columns in tiles))

    def _tensors(self, layer: str, parts: CodedParts) -> dict[str, Tensor]:
        found = {"trellis": parts.trellis, "suh": parts.suh, "svh": parts.svh}
        if self._tlut is not None:
            found["tlut"] = self._tlut
        return {f"{layer}.{part}": tensor.cpu().clone() for part, tensor in found.items()}

    def _dense(self, layer: str, tensors: dict[str, Tensor]) -> Tensor:
        trellis, suh, svh = (tensors[f"{layer}.{part}"] for part in _PARTS[:3])
        coded = Coded(trellis, suh, svh, self._code, self._tlut)
        return dense(coded.to(self._coder.table.device))


class _Progress:
    """Progress on weights, counted in tiles that are searched."""

    def __init__(self, reporter: Reporter, num_weights: int) -> None:
        self._move = reporter.move
        self.note = reporter.note
        self._num_weights = num_weights
        self._finished = 0
        self._searched = 0

    def counting(self, search: Search) -> Search:
        def counted(tiles: Tensor) -> Tensor:
            states = search(tiles)
            self._searched += tiles.numel()
            self._tell()
            return states

        return counted

    def reach(self, num_weights: int) -> None:
        """So many more are done, whatever was searched for them."""
        self._finished += num_weights
        self._searched = 0
        self._tell()

    def _tell(self) -> None:
        self._move(min(1.0, (self._finished + self._searched) / self._num_weights))


def _size(weights: StoredWeights, layer: str) -> int:
    num_out, num_in = weights.shapes[f"{layer}.weight"]
    return num_out * num_in


def _write(
    source: Path,
    target: Path,
    weights: StoredWeights,
    coded: set[str],
    kept: set[str],
    coding: Coding,
    finished: FinishedBlocks,
) -> None:
    """The whole folder, of what is finished and of the model's other tensors."""
    copy_settings(source, target)
    config = read_json(source / "config.json", "a model folder needs it")
    config["quantization_config"] = _settings(coding, kept)
    with os_errors("write", target):
        (target / "config.json").write_text(json.dumps(config, indent=2))
        others = [n for n in weights.places if n.removesuffix(".weight") not in coded]
        specs = [TensorSpec(name, *weights.places[name][1:]) for name in others]
        blocks = blocks_of(coded)
        for block in blocks:
            specs += [
                TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
                for name, tensor in _read(finished, block).items()
            ]
        files = TensorFolder(target, specs)
        try:
            for name in others:
                files.write(name, content_of(weights.read(name)))
            for block in blocks:
                for name, tensor in _read(finished, block).items():
                    files.write(name, content_of(tensor))
            files.close()
        except BaseException:
            files.abandon()
            raise


def _read(finished: FinishedBlocks, block: str) -> dict[str, Tensor]:
    tensors = finished.read(block)
    assert tensors is not None, f"{block} is gone"
    return tensors


def _settings(coding: Coding, kept: set[str]) -> dict[str, Any]:
    """What config.json says, as `quantization_config`."""
    return {
        "quant_method": "qtip",
        "format_version": 1,
        "L": 16,
        "T": 256,
        "default": {"K": coding.num_bits, "V": CODES[coding.code], "code": coding.code},
        "had_in": "block128",
        "had_out": "block128",
        "lane_order": "exl3",
        "modules": {layer: {"unquantized": True} for layer in sorted(kept)},
        "calibration": {"rows": len(coding.texts)},
    }
