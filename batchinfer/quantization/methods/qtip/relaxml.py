"""Layers of QTIP's own published models, in the tensors of the format that is run here.

QTIP's code stores `trellis` int16 [tiles, 16 K], `SU` [in], `SV` [out] with the scale in it, and
`tlut`; code HYB, windows that begin at their slots, operand A's lane order, and Hadamards of whole
sides, whose q x q parts it does not store. Nothing is quantized again: streams are rotated, tiles
transposed. Formulas: QTIP (arXiv 2406.11235). Must not know: files, folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import TLUT_BITS
from batchinfer.quantization.methods.qtip.hadamard import is_hadamard
from batchinfer.quantization.methods.qtip.trellis import TILE, pack, states_of_stream

#: Of `quip_params`, which is what config.json of such a model has.
_WANTED = {
    "codebook": "bitshift",
    "L": 16,
    "V": 2,
    "tlut_bits": TLUT_BITS,
    "decode_mode": "quantlut_sym",
    "td_x": TILE,
    "td_y": TILE,
}
#: Rows q of the Hadamard matrices that are not powers of two.
_ODD_SIZES = (12, 20, 28, 36, 52, 60, 108, 116, 124, 140, 156, 172)
_BITS = (2, 3, 4)


def unknown_params(params: Mapping[str, Any]) -> str:
    """In words, what of `quip_params` cannot be converted; "" if nothing."""
    for key, value in _WANTED.items():
        if params.get(key) != value:
            return f"{key} {params.get(key)!r} (only {value!r} is converted)"
    return ""


def settings(bits: Mapping[str, int]) -> dict[str, Any]:
    """`quantization_config` of the converted model. `bits`: of each layer."""
    layers = {name: {"K": num_bits, "V": 2, "code": "hyb"} for name, num_bits in bits.items()}
    return {
        "quant_method": "qtip",
        "format_version": 1,
        "L": 16,
        "T": 256,
        "lane_order": "qtip",
        "had_in": "full",
        "had_out": "full",
        "default": {"K": min(bits.values()), "V": 2, "code": "hyb"},
        "modules": layers,
    }


def odd_size(size: int) -> int:
    """q of a side of q 2^p inputs or outputs; 1 for a power of two. ValueError for others."""
    odd = size // (size & -size)
    if odd == 1:
        return 1
    if 4 * odd not in _ODD_SIZES or size % (4 * odd):
        raise ValueError(f"{size} is not a power of two times one of {_ODD_SIZES}")
    return 4 * odd


def shapes(trellis: tuple[int, ...], num_in: int, num_out: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the converted tensors. Raises ValueError if no such layer has this trellis."""
    num_tiles = num_in * num_out // TILE**2
    num_bits = trellis[-1] // TILE
    is_right = trellis == (num_tiles, TILE * num_bits) and num_bits in _BITS
    if not is_right or num_in % 32 or num_out % 32:
        raise ValueError(
            f"a trellis {list(trellis)} for {num_in} inputs and {num_out} outputs is not in the "
            "layout of QTIP's kernels (2, 3 or 4 bits, sizes that are multiples of 32)"
        )
    found: dict[str, tuple[int, ...]] = {
        "trellis": (num_in // TILE, num_out // TILE, TILE * num_bits),
        "suh": (num_in,),
        "svh": (num_out,),
        "tlut": (1 << TLUT_BITS, 2),
    }
    for name, size in (("had_in", num_in), ("had_out", num_out)):
        if (odd := odd_size(size)) > 1:
            found[name] = (odd, odd)
    return found


def convert_layer(parts: Mapping[str, Tensor], odd: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer. `odd`: the q x q Hadamard matrices by q.

    Raises ValueError for layers that were cut for several devices (`rcp`), and for a matrix that is
    missing.
    """
    if int(parts.get("rcp", torch.tensor(0))):
        raise ValueError(
            f"its Hadamard is cut for {int(parts['tp_rank'])} devices, which is not converted: "
            "give the model that was made for one"
        )
    num_in, num_out = len(parts["SU"]), len(parts["SV"])
    wanted = shapes(tuple(parts["trellis"].shape), num_in, num_out)
    found = {
        "trellis": _trellis(parts["trellis"], num_in, num_out),
        "suh": parts["SU"].half(),
        "svh": parts["SV"].float(),
        "tlut": parts["tlut"].half(),
    }
    for name in ("had_in", "had_out"):
        if name in wanted:
            found[name] = _matrix(odd, wanted[name][0])
    return found


def _matrix(odd: Mapping[int, Tensor], size: int) -> Tensor:
    matrix = odd.get(size)
    if matrix is None:
        raise ValueError(
            f"its Hadamard has a part of {size} x {size}, which such checkpoints do not hold: "
            f"store the matrix that QTIP's code has for it as `had_{size}` in the file "
            "hadamard.safetensors of the model's folder"
        )
    if len(matrix) != size or not is_hadamard(matrix):
        raise ValueError(f"had_{size} of hadamard.safetensors is not a Hadamard matrix")
    return matrix.to(torch.int8)


def _trellis(stored: Tensor, num_in: int, num_out: int) -> Tensor:
    """As it is kept here: [in / 16, out / 16, 16 K]."""
    num_bits = stored.shape[1] // TILE
    # Of each 2 x 2 tiles and lane, K bytes of a little-endian integer for each tile.
    raw = stored.contiguous().view(torch.uint8)
    raw = raw.view(num_out // 32, num_in // 32, 32, 2, 2, num_bits)  # out, in, lane, in, out, byte
    tiles = []
    for rows in raw:
        lanes = rows.permute(0, 2, 3, 1, 4).flip(-1)  # [in, in, out, lane, byte], highest first
        stream = lanes.reshape(num_in // TILE, 2, TILE * num_bits, 2)
        words = stream.flip(-1).contiguous().view(torch.int16).squeeze(-1)
        tiles.append(pack(states_of_stream(words, 2, "start"), num_bits))
    return torch.cat(tiles, 1)
