"""Coded layers in a CPU's memory: how weights are laid out there, and how the kernels are called.

The kernels are `kernels/cpu/linear.cpp`, one library for every code and number of bits, called
through ctypes with plain pointers. All scratch memory that grows with tokens or weights is torch's.
Must not know: vLLM, files of checkpoints.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import STEPS
from batchinfer.quantization.methods.qtip.trellis import LANE_ORDERS, TILE, bits_of, swap_halves

_NUMBERS = {"3inst": 4, "mcg": 0, "mul1": 1, "hyb": 2, "1mad": 3}  # of decode.h
#: Code -> (its number, multiplier and addend of its congruential step).
KINDS = {code: (number, *STEPS.get(code, (0, 0))) for code, number in _NUMBERS.items()}
ORDERS = {order: number for number, order in enumerate(LANE_ORDERS)}
#: From this many tokens on factors are rounded to bfloat16, where activations are and the CPU
#: multiplies such numbers (kernels/README.md has what was measured).
BFLOAT16_FROM = 4
#: From this many on outputs are decoded in slices that torch multiplies; and where activations are
#: bfloat16 and the kernels lack its products.
DENSE_FROM = 256
_DENSE_FROM_WITHOUT = 32

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_BLOCK = 128
_LANES = 32
#: Bytes of weights that are decoded at once for torch.
_DENSE_BYTES = 8 << 20


def words_of(trellis: Tensor) -> Tensor:
    """Stored tiles int16 [in / 16, out / 16, 16 K] as the kernels read them.

    uint8 [out / 16, in / 16, 32 K]: of the 8 K bits that each of a tile's 32 lanes owns the first
    16, as little-endian numbers, then the next 16, then 8 if K is odd; lanes in the order 0, 16, 1,
    17 and so on. See `decode.h`.
    """
    num_bits = bits_of(trellis)
    # Big-endian halves of the stream to bytes, in the stream's order.
    stream = swap_halves(trellis).contiguous().view(torch.uint8).unflatten(-1, (-1, 2)).flip(-1)
    lanes = stream.flatten(-2).unflatten(-1, (_LANES, num_bits)).transpose(0, 1)
    pairs = lanes.unflatten(-2, (2, _LANES // 2)).transpose(-2, -3)
    planes = [pairs[..., i : i + 2].flip(-1).flatten(-3) for i in range(0, num_bits, 2)]
    return torch.cat(planes, -1).contiguous()


class _Layer(ctypes.Structure):
    """TrellisLayer of linear.cpp."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("suh", ctypes.c_void_p),
        ("svh", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("code", ctypes.c_int),
        ("is_qtip_order", ctypes.c_int),
        ("multiplier", ctypes.c_uint32),
        ("addend", ctypes.c_uint32),
    )


class Layer(NamedTuple):
    """Outputs that share their inputs' signs, code and bits."""

    weights: Tensor  # uint8 [out / 16, in / 16, 32 K], `words_of`
    suh: Tensor  # float32 [in]
    svh: Tensor  # float32 [out]
    code: str
    table: Tensor | None = None  # int32 [1024], `pairs_of`
    lane_order: str = "exl3"

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weights.shape[1] * TILE, self.weights.shape[0] * TILE

    def as_struct(self) -> Any:
        kind, multiplier, addend = KINDS[self.code]
        return _Layer(
            *(self.weights.data_ptr(), self.suh.data_ptr(), self.svh.data_ptr()),
            None if self.table is None else self.table.data_ptr(),
            *(*self.sizes, self.weights.shape[2] // _LANES, kind),
            *(ORDERS[self.lane_order], multiplier, addend),
        )


def pairs_of(tlut: Tensor) -> Tensor:
    """The table of `hyb`, float16 [512, 2], with its first numbers' signs: int32 [1024]."""
    negated = torch.stack([-tlut[:, 0], tlut[:, 1]], 1)
    return torch.cat([tlut, negated]).contiguous().view(torch.int32).flatten()


class Library:
    """The shared library, with tensors instead of pointers."""

    def __init__(self, file: Path) -> None:
        self._lib = ctypes.CDLL(str(file))
        self.has_bfloat16 = bool(self._lib.trellis_has_bfloat16())

    def linear(self, x: Tensor, layer: Layer, y: Tensor) -> None:
        """y = x W'. x [tokens, in], y [tokens, out] of the same dtype; rows are contiguous."""
        is_narrow = x.dtype == torch.bfloat16
        lacks = is_narrow and not self.has_bfloat16
        if len(x) >= (_DENSE_FROM_WITHOUT if lacks else DENSE_FROM):
            self.multiply_dense(x, layer, y)
        elif is_narrow and not lacks and len(x) >= BFLOAT16_FROM:
            self.multiply(x, layer, y, torch.bfloat16)
        else:
            self.multiply(x, layer, y)

    def multiply(
        self, x: Tensor, layer: Layer, y: Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        """The same, decoding for all tokens within the kernel. `dtype`: of products' factors."""
        own = layer.as_struct()
        inputs = self._transformed(x, own, dtype)
        self._lib.trellis_linear(
            *(ctypes.byref(own), _void(inputs), _DTYPES[dtype], len(x), _void(y)),
            *(ctypes.c_int64(y.stride(0)), _DTYPES[y.dtype], torch.get_num_threads()),
        )

    def multiply_dense(self, x: Tensor, layer: Layer, y: Tensor) -> None:
        """The same, decoding slices of outputs for torch to multiply with.

        In bfloat16 if that is the activations'; else in float32.
        """
        own = layer.as_struct()
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        inputs = self._transformed(x, own, dtype)
        num_in, num_out = layer.sizes
        at_once = max(_BLOCK, _DENSE_BYTES // (dtype.itemsize * num_in) // _BLOCK * _BLOCK)
        rows = torch.empty(min(at_once, num_out), num_in, dtype=dtype)
        for first in range(0, num_out, at_once):
            decoded = rows[: min(at_once, num_out - first)]
            self.decode(layer, first, decoded)
            z = inputs @ decoded.T
            self._lib.trellis_output(
                *(ctypes.byref(own), _void(z), _DTYPES[dtype], len(x)),
                *(ctypes.c_int64(first), ctypes.c_int64(len(decoded)), _void(y)),
                *(ctypes.c_int64(y.stride(0)), _DTYPES[y.dtype], torch.get_num_threads()),
            )

    def decode(self, layer: Layer, first: int, to: Tensor) -> None:
        """Outputs from `first` on, as many as `to` has rows, before signs and Hadamards.

        `to`: float32 or bfloat16 [count, in], inputs of each tile in the kernels' order, [in div 8,
        in mod 2, (in mod 8) div 2].
        """
        own, span = layer.as_struct(), (ctypes.c_int64(first), ctypes.c_int64(len(to)))
        threads = torch.get_num_threads()
        self._lib.trellis_dense(ctypes.byref(own), *span, _void(to), _DTYPES[to.dtype], threads)

    def _transformed(self, x: Tensor, own: Any, dtype: torch.dtype) -> Tensor:
        """x * suh and its Hadamard, in the order that the kernels read: [tokens, in]."""
        to = torch.empty(x.shape, dtype=dtype)
        self._lib.trellis_input(
            *(ctypes.byref(own), _void(x), ctypes.c_int64(x.stride(0)), _DTYPES[x.dtype]),
            *(len(x), _void(to), _DTYPES[dtype], torch.get_num_threads()),
        )
        return to


def _void(tensor: Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())
