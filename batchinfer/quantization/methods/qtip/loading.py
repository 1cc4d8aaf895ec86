"""The tensors of one layer as they arrive from a checkpoint, cut to what this device computes.

A layer of the engine may be several of the checkpoint side by side (queries, keys and values), each
with bits, code and scales of its own, or the other way round. Cuts between devices are at multiples
of 128, at which Hadamards and tiles end. Must not know: vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from batchinfer.quantization.methods.qtip.dense import Coded, signs_of_bits, sizes
from batchinfer.quantization.methods.qtip.files import (
    BLOCK,
    MARKERS,
    PARTS,
    TILE,
    LayerFormat,
    missing,
    padded,
    wrong_hadamard,
    wrong_shape,
)
from batchinfer.quantization.methods.qtip.hadamard import is_hadamard

#: What parts are stored as. Numbers of scales have several types, of which this is the widest.
DTYPES = {part: torch.float32 for part in PARTS} | {
    **dict.fromkeys(("trellis", "su", "sv"), torch.int16),
    **dict.fromkeys(MARKERS, torch.int32),
    **dict.fromkeys(("had_in", "had_out"), torch.int8),
    "tlut": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Span:
    """Inputs or outputs of one part of a layer: the whole, and this device's share of it."""

    size: int
    first: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.first

    @property
    def is_whole(self) -> bool:
        return (self.first, self.end) == (0, self.size)

    @property
    def is_aligned(self) -> bool:
        """Whether tiles and Hadamards can be cut there."""
        return self.is_whole or not (self.first % BLOCK or self.end % BLOCK)


class LayerPieces:
    """The parts of one layer: `tensors[i]` has those of part i by their names in the checkpoint."""

    def __init__(self, name: str, inputs: Span, outputs: Sequence[Span]) -> None:
        """`outputs`: of each part. Raises ValueError for a cut that is not at a multiple of 128."""
        self.name = name
        self.inputs = inputs
        self.outputs = tuple(outputs)
        self.tensors: list[dict[str, Tensor]] = [{} for _ in outputs]
        for side, span in (("inputs", inputs), *(("outputs", span) for span in outputs)):
            if not span.is_aligned:
                raise ValueError(
                    f"{name}: its {span.size} {side} would be cut at {span.first} and {span.end} "
                    f"between devices, and blocks of {BLOCK} cannot be: lower "
                    "model.tensor_parallel_size (vLLM's tensor_parallel_size)"
                )

    def add(self, part: str, tensor: Tensor, indices: Sequence[int]) -> None:
        """Take a tensor that holds the outputs of the parts `indices`, one after the other."""
        first = 0
        for index in indices:
            span = self.outputs[index]
            last = first + span.size
            outputs = slice(first, None if index == indices[-1] else last)
            if outputs != slice(0, None) and (first % BLOCK or last % BLOCK):
                raise ValueError(f"{self.name}: parts of {span.size} outputs are stored as one")
            self.tensors[index][part] = self._cut(part, tensor, index, outputs)
            first = last

    def _cut(self, part: str, tensor: Tensor, index: int, outputs: slice) -> Tensor:
        if part in ("trellis", "suh", "su"):
            width = 1 if part == "suh" else TILE
            tensor = _share(tensor, self.inputs, width, 0)
        if part in ("trellis", "svh", "sv"):
            width, dimension = (1 if part == "svh" else TILE), (1 if part == "trellis" else 0)
            end = tensor.shape[dimension] if outputs.stop is None else outputs.stop // width
            first = outputs.start // width
            tensor = tensor.narrow(dimension, first, end - first)
            tensor = _share(tensor, self.outputs[index], width, dimension)
        return tensor

    def coded(self, index: int, layer: LayerFormat) -> Coded:
        """Part `index`. Raises ValueError for what is missing or of another size."""
        parts = self.tensors[index]
        problems = list(missing(parts))
        if not problems:
            problems = [*wrong_shape(list(parts["trellis"].shape)), *self._wrong_sizes(index)]
            scales = (name for name in ("suh", "svh", "tlut") if name in parts)
            problems += [f"{n} has NaN or infinity" for n in scales if not _is_finite(parts[n])]
            problems += _wrong_hadamards(parts, layer)
        if problems:
            raise ValueError(f"{self.name}: {problems[0]}: copy the checkpoint again")
        cut = not all(span.is_whole for span in (self.inputs, self.outputs[index]))
        if cut and (layer.has_full_in or layer.has_full_out):
            raise ValueError(
                f"{self.name} has a Hadamard over a whole side, which cannot be cut between "
                "devices: set model.tensor_parallel_size (vLLM's tensor_parallel_size) to 1"
            )
        return Coded(
            trellis=parts["trellis"].contiguous(),
            suh=parts["suh"] if "suh" in parts else signs_of_bits(parts["su"]),
            svh=parts["svh"] if "svh" in parts else signs_of_bits(parts["sv"]),
            code=layer.code,
            tlut=parts.get("tlut"),
            lane_order=layer.lane_order,
            full_in=_full(parts, "had_in") if layer.has_full_in else None,
            full_out=_full(parts, "had_out") if layer.has_full_out else None,
        )

    def _wrong_sizes(self, index: int) -> list[str]:
        found = [TILE * size for size in self.tensors[index]["trellis"].shape[:2]]
        spans = (self.inputs, self.outputs[index])
        return [
            f"its trellis has {size} {side}, and the model {span.width}"
            for side, size, span in zip(("inputs", "outputs"), found, spans, strict=True)
            if size != padded(span.width)
        ]

    def is_padded(self, index: int, layer: Coded) -> bool:
        """Whether the checkpoint has more inputs or outputs than the model."""
        wanted = [span.width for span in (self.inputs, self.outputs[index])]
        return list(sizes(layer)) != wanted


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def padded_rows(whole: Tensor, rows: Span, size: int) -> Tensor:
    """This device's rows of an output layer, and zeros up to the size that the engine gives it."""
    own = whole[rows.first : rows.end]
    return functional.pad(own, (0, 0, 0, size - len(own)))


def random_parts(num_in: int, num_out: int, said: Mapping[str, int | str]) -> dict[str, Tensor]:
    """Parts of a layer that stands for no model, for runs that only measure. `said`: K, code."""
    num_bits = int(said.get("K", 4))
    shape = (padded(num_in) // TILE, padded(num_out) // TILE, TILE * num_bits)
    parts = {
        "trellis": torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16),
        "suh": torch.full((padded(num_in),), 0.01, dtype=torch.float16),
        "svh": torch.ones(padded(num_out), dtype=torch.float16),
    }
    if said.get("code") == "hyb":
        parts["tlut"] = torch.randn(512, 2).half()
    return parts


def _wrong_hadamards(parts: Mapping[str, Tensor], layer: LayerFormat) -> Iterator[str]:
    """A matrix that is none would be computed with: zeros make a layer of zeros."""
    fulls = (layer.has_full_in, layer.has_full_out)
    for dimension, (side, is_full) in enumerate(zip(("in", "out"), fulls, strict=True)):
        matrix = parts.get(f"had_{side}")
        shape = None if matrix is None else tuple(matrix.shape)
        size = TILE * parts["trellis"].shape[dimension]
        problems = list(wrong_hadamard(side, size, shape, is_full=is_full))
        yield from problems
        if matrix is not None and not problems and not is_hadamard(matrix):
            yield f"had_{side} is not a Hadamard matrix of 1 and -1"


def _share(tensor: Tensor, span: Span, width: int, dimension: int) -> Tensor:
    """This device's of a dimension that has an entry for each `width` inputs or outputs."""
    if span.is_whole:
        return tensor
    return tensor.narrow(dimension, span.first // width, span.width // width)


def _full(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts.get(name, torch.ones(1, 1))
