"""Packed weights as transformers writes them with bitsandbytes, dequantized again.

Must not know: vLLM, where the weights go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator

import torch

#: Weights that share a scale; bitsandbytes' default.
BLOCK_SIZE = 64
_STATE = "quant_state.bitsandbytes__"
#: Of 8-bit weights: in rows. Older bitsandbytes wrote tiles of its CUDA kernels as well (1 to 3).
_IN_ROWS = 0


def kernel_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to ask bitsandbytes for, whose CPU kernel takes each row for the start of a block.

    Flat it is right for any shape; 28 instead of 23 ms for 4096 x 4096 on two cores.
    """
    return shape if shape[-1] % BLOCK_SIZE == 0 else (math.prod(shape),)


def dequantized(
    weights: Iterable[tuple[str, torch.Tensor]], kind: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Packed weights and what belongs to them as one float32 tensor each; others as they are.

    Tensors come in any order; each weight leaves as soon as it is whole. Raises ValueError if one
    never is, or is not of the kind that config.json says (nf4, fp4, int8): what quantizes it again
    would make another weight of it.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}  # weight -> its tensors, by the rest of names
    for name, tensor in weights:
        weight_name, piece = _split(name, tensor)
        if piece is None:
            yield name, tensor
            continue
        _check(weight_name, piece, tensor, kind)
        pieces = waiting.setdefault(weight_name, {})
        pieces[piece] = tensor
        if (whole := _dequantize(pieces)) is not None:
            del waiting[weight_name]
            yield weight_name, whole
    for name, pieces in waiting.items():
        if pieces.keys() == {""} and pieces[""].is_floating_point():
            yield name, pieces[""]  # a layer of one input
        elif "" in pieces:
            raise ValueError(f"the checkpoint lacks what belongs to the packed weight {name}")


def _split(name: str, tensor: torch.Tensor) -> tuple[str, str | None]:
    """(weight, piece of it): "" is the packed weight itself, None a tensor of no packed weight."""
    path, separator, piece = name.partition(".weight.")
    if separator:
        return f"{path}.weight", piece
    if name.endswith(".SCB"):
        return f"{name.removesuffix('.SCB')}.weight", "SCB"
    if name.endswith(".weight_format"):
        return f"{name.removesuffix('.weight_format')}.weight", "format"
    is_packed = tensor.dtype in (torch.uint8, torch.int8)
    is_packed |= tensor.ndim == 2 and tensor.shape[1] == 1  # bytes that are called bfloat16, ...
    return name, "" if is_packed and name.endswith(".weight") else None


def _check(name: str, piece: str, tensor: torch.Tensor, kind: str) -> None:
    """Raise ValueError if a piece belongs to a weight that is not read, or not of this kind."""
    found = piece.partition(_STATE)[2] or ("int8" if piece == "SCB" else kind)
    if found != kind:
        raise ValueError(f"{name} is stored as {found} of bitsandbytes, config.json says {kind}")
    if piece == "format" and int(tensor) != _IN_ROWS:
        raise ValueError(
            f"{name} is stored in tiles (weight_format {int(tensor)}), which are not read here: "
            "save the checkpoint again with a newer bitsandbytes, or give the unquantized model"
        )


def _dequantize(pieces: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """[out, in], None while pieces are missing."""
    packed = pieces.get("")
    if packed is None:
        return None
    if "SCB" in pieces:
        return packed * (pieces["SCB"].float()[:, None] / 127)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state_piece = next((piece for piece in pieces if _STATE in piece), None)
    needed = {"absmax", "quant_map"}
    if state_piece is None or not needed <= pieces.keys():
        return None
    settings = json.loads(bytes(pieces[state_piece].tolist()))
    if (
        "nested_blocksize" in settings
        and not {"nested_absmax", "nested_quant_map"} <= pieces.keys()
    ):
        return None
    state = QuantState.from_dict({k: v for k, v in pieces.items() if k}, device=packed.device)
    if state.blocksize != BLOCK_SIZE:
        raise ValueError(
            f"the checkpoint has blocks of {state.blocksize} weights; {BLOCK_SIZE} are read here"
        )
    state.dtype = torch.float32
    shape = tuple(state.shape)
    state.shape = kernel_shape(shape)
    weight: torch.Tensor = dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state)
    return weight.view(shape)
