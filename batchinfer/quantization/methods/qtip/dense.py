"""A coded layer as the weight that it stands for, in the basis of the model's activations.

W [in, out] = diag(suh) U_in C U_out' diag(svh), C the decoded tiles, U the Hadamards. This is what
every kernel's results are held against, and what a CPU computes with. Must not know: vLLM, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import table
from batchinfer.quantization.methods.qtip.hadamard import BLOCK, block_hadamard, full_hadamard
from batchinfer.quantization.methods.qtip.trellis import TILE, decode_tiles

#: Outputs that are decoded at once: bounds what is held beside the result.
_OUTPUTS_AT_ONCE = 4 * BLOCK

_Transform = Callable[[Tensor], Tensor]


class Coded(NamedTuple):
    """The tensors of one linear layer and how they are to be read."""

    trellis: Tensor  # int16 [in / 16, out / 16, 16 K]
    suh: Tensor  # float [in]: signs and scales of inputs
    svh: Tensor  # float [out]
    code: str
    tlut: Tensor | None = None  # float16 [2^Q, 2], of `hyb`
    lane_order: str = "exl3"
    #: Over the whole side instead of blocks of 128, by this q x q matrix times Sylvester's ([1, 1]:
    #: by Sylvester's alone).
    full_in: Tensor | None = None
    full_out: Tensor | None = None

    def to(self, device: torch.device) -> Coded:
        fields = self._asdict().items()
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in fields}
        return Coded(**moved)


def dense(layer: Coded, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, `dtype` [out, in], computed in float32 and rounded once. y = x W'."""
    num_in, num_out = sizes(layer)
    weight = torch.empty(num_out, num_in, dtype=dtype, device=layer.trellis.device)
    first = 0
    for rows in dense_rows(layer, dtype):
        weight[first : first + len(rows)] = rows
        first += len(rows)
    return weight


def dense_rows(layer: Coded, dtype: torch.dtype, values: Tensor | None = None) -> Iterator[Tensor]:
    """`dense` in pieces, `dtype` [some outputs, in], in order. `values`: the code's `table`."""
    if values is None:
        values = table(layer.code, layer.tlut).to(layer.trellis.device)
    _, num_out = sizes(layer)
    along_in, along_out = _transform(layer.full_in), _transform(layer.full_out)
    suh, svh = layer.suh.float(), layer.svh.float()
    at_once = num_out if layer.full_out is not None else _OUTPUTS_AT_ONCE
    for first in range(0, num_out, at_once):
        end = min(first + at_once, num_out)
        tiles = layer.trellis[:, first // TILE : end // TILE]
        coded = decode_tiles(tiles, values, layer.lane_order)  # [in, outputs]
        rows = along_in(along_out(coded).T)  # [outputs, in]
        yield (rows * suh * svh[first:end, None]).to(dtype)


def sizes(layer: Coded) -> tuple[int, int]:
    """(in, out), both multiples of 128."""
    return TILE * layer.trellis.shape[0], TILE * layer.trellis.shape[1]


def signs_of_bits(bits: Tensor) -> Tensor:
    """Signs from a field of bits, the lowest first, 1 for minus: int16 [n / 16] -> float16 [n]."""
    shifts = torch.arange(16, device=bits.device)
    return (1 - 2 * ((bits.to(torch.int32)[:, None] >> shifts) & 1)).flatten().half()


def _transform(full: Tensor | None) -> _Transform:
    if full is None:
        return block_hadamard
    odd = None if len(full) == 1 else full
    return lambda values: full_hadamard(values, odd)
