"""A coded layer as the weight that it stands for, in the basis of the model's activations.

W [in, out] = diag(suh) U_in C U_out' diag(svh), C the decoded tiles, U the Hadamards. This is what
every kernel's results are held against, and what a CPU computes with. Must not know: vLLM, files.
"""

from __future__ import annotations

from collections.abc import Callable
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


def dense(layer: Coded, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, `dtype` [out, in], computed in float32 and rounded once. y = x W'."""
    values = table(layer.code, layer.tlut).to(layer.trellis.device)
    num_in, num_out = (TILE * size for size in layer.trellis.shape[:2])
    along_in, along_out = _transform(layer.full_in), _transform(layer.full_out)
    suh, svh = layer.suh.float(), layer.svh.float()
    weight = torch.empty(num_out, num_in, dtype=dtype, device=layer.trellis.device)
    at_once = num_out if layer.full_out is not None else _OUTPUTS_AT_ONCE
    for first in range(0, num_out, at_once):
        end = min(first + at_once, num_out)
        tiles = layer.trellis[:, first // TILE : end // TILE]
        coded = decode_tiles(tiles, values, layer.lane_order)  # [in, outputs]
        rows = along_in(along_out(coded).T)  # [outputs, in]
        weight[first:end] = (rows * suh * svh[first:end, None]).to(dtype)
    return weight


def _transform(full: Tensor | None) -> _Transform:
    if full is None:
        return block_hadamard
    odd = None if len(full) == 1 else full
    return lambda values: full_hadamard(values, odd)
