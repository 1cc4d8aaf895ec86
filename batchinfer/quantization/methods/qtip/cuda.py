"""Coded layers on a GPU of NVIDIA: how weights are laid out there, and which kernel multiplies.

The kernels are `kernels/cuda/`, one shared library for (bits, kind of code, lane order), called
through ctypes with plain pointers: no torch header is needed to build one. All scratch memory comes
from torch in each call, so it is in the engine's account of memory and in a CUDA graph's own pool.
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

_NUMBERS = {"3inst": 0, "mcg": 0, "mul1": 1, "hyb": 2, "1mad": 3}  # of decode.cuh
#: Code -> (what a library is built for, multiplier and addend of its congruential step).
KINDS = {code: (number, *STEPS.get(code, (0, 0))) for code, number in _NUMBERS.items()}
ORDERS = {order: number for number, order in enumerate(LANE_ORDERS)}

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_GROUP = 8  # tiles, along the inputs
_BLOCK = 128
#: Of the transformed activations, which are float16: 2^-5 leaves room for outliers of 2 million.
_X_SCALE = 1 / 32
#: Blocks of tokens that a launch can have, at least: 512 tokens of the largest kernel's fewest.
_TOKEN_BLOCKS = 4
#: Above this many outputs a matrix gives each SM enough work in blocks of 256 outputs.
_MANY_OUTPUTS = 8192
#: Above this many weights decoding apart from the product costs more than decoding twice.
_MANY_WEIGHTS = 40 << 20
#: Not a kernel's number: weights are decoded, and cuBLAS multiplies.
DENSE = -1
#: Bytes of weights that are decoded at once for cuBLAS: they stay in the second-level cache.
_DENSE_BYTES = 24 << 20

TERMS, PAIRS, ROWS, CORES = range(4)


def words_of(trellis: Tensor) -> Tensor:
    """Stored tiles int16 [in / 16, out / 16, 16 K] as the kernels read them.

    uint8 [out / 16, in / 128, 256 K]: 16 outputs and 128 inputs are a group of 8 tiles. Of each
    tile a lane owns K bytes, last bits first; bytes 2 i and 2 i + 1 of all tiles stand together
    (16 bytes a lane), then the last one if K is odd (8 bytes a lane). See `decode.cuh`.
    """
    num_bits = bits_of(trellis)
    size_in, size_out = trellis.shape[:2]
    stream = swap_halves(trellis).contiguous().view(torch.uint8)
    # Little-endian halves of a big-endian stream; then each lane's bytes, last first.
    stream = stream.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).unflatten(-1, (32, num_bits))
    lanes = stream.flip(-1).view(size_in // _GROUP, _GROUP, size_out, 32, num_bits)
    lanes = lanes.permute(2, 0, 3, 1, 4)  # [out / 16, in / 128, lane, tile, byte]
    planes = [lanes[..., i : i + 2].flatten(2) for i in range(0, num_bits, 2)]
    return torch.cat(planes, -1).contiguous()


class _Linear(ctypes.Structure):
    """QtipLinear of qtip.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("suh", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("svh", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("fragments", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("multiplier", ctypes.c_uint32),
        ("addend", ctypes.c_uint32),
        ("x_scale", ctypes.c_float),
    )


class Layer(NamedTuple):
    """Outputs that share their inputs' signs, code and bits, on a GPU."""

    weights: Tensor  # uint8 [out / 16, in / 128, 256 K], `words_of`
    suh: Tensor  # float16 [in]
    svh: Tensor  # float16 [out]
    counters: Tensor  # int32 [at least blocks of tokens x out / 128], zeros
    code: str
    bits: int
    table: Tensor | None = None  # float16 [512, 2]
    lane_order: str = "exl3"

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weights.shape[1] * _BLOCK, self.weights.shape[0] * TILE


def counters_for(num_out: int, device: torch.device, blocks: int = _TOKEN_BLOCKS) -> Tensor:
    """What kernels count finished parts with: zeros, which each launch leaves as it found them.

    `blocks`: of tokens, each as many as a kernel takes at once.
    """
    return torch.zeros(blocks * (num_out // _BLOCK), dtype=torch.int32, device=device)


def variant_for(tokens: int, inputs: int, outputs: int) -> int:
    """The fastest way of those measured (kernels/README.md): a number of qtip.cu's, or DENSE.

    0 to 3 are mma.sync for 8, 16, 32, 64 tokens; 4 to 7 wgmma for 64, 128, 192, 256.
    """
    is_large = outputs > _MANY_OUTPUTS
    for variant, most in enumerate((8, 16, 32)):
        if tokens <= most:
            return variant
    if tokens <= 64:
        return 4 if is_large else 3
    if tokens <= 128 and is_large:
        return 5
    if tokens <= 192:
        return 6
    most = 512 if inputs * outputs > _MANY_WEIGHTS else 256
    return 7 if tokens <= most else DENSE


class Library:
    """One shared library: its kernels' launches, with tensors instead of pointers.

    A launch goes to the device of its tensors, whichever is the current one.
    """

    def __init__(self, file: Path) -> None:
        self._lib = ctypes.CDLL(str(file))
        for name in ("qtip_fragment_bytes", "qtip_part_bytes"):
            getattr(self._lib, name).restype = ctypes.c_int64
        self._lib.qtip_error.restype = ctypes.c_char_p
        self._prepared: set[torch.device] = set()
        self._prepare(torch.device("cuda", torch.cuda.current_device()))  # not inside a graph
        count = self._lib.qtip_variants()
        self.variants = [self._lib.qtip_variant_tokens(i) for i in range(count)]

    def overlap(self, is_on: bool) -> None:
        """Whether a kernel may start while the one before it ends; on by default."""
        self._lib.qtip_overlap(int(is_on))

    def multiply(
        self, x: Tensor, layer: Layer, y: Tensor, bias: Tensor | None, variant: int
    ) -> None:
        """y = x W', decoding in kernel `variant`. x [tokens, in], y [tokens, out], same dtype."""
        with torch.cuda.device(x.device):
            self._multiply(x, layer, y, bias, variant)

    def _multiply(
        self, x: Tensor, layer: Layer, y: Tensor, bias: Tensor | None, variant: int
    ) -> None:
        self._prepare(x.device)
        tokens, (inputs, outputs) = len(x), layer.sizes
        if -(-tokens // self.variants[variant]) * (outputs // _BLOCK) > len(layer.counters):
            raise ValueError(f"{tokens} tokens, and counters for {len(layer.counters)} blocks")
        fragments = self._lib.qtip_fragment_bytes(variant, tokens, inputs)
        parts = self._lib.qtip_part_bytes(variant, tokens, inputs, outputs)
        scratch = torch.empty(fragments + parts, dtype=torch.uint8, device=x.device)
        _, multiplier, addend = KINDS[layer.code]
        args = _Linear(
            *(x.data_ptr(), x.stride(0), layer.suh.data_ptr(), layer.weights.data_ptr()),
            *(layer.svh.data_ptr(), _pointer(bias), _pointer(layer.table)),
            *(y.data_ptr(), y.stride(0), scratch.data_ptr(), scratch.data_ptr() + fragments),
            *(layer.counters.data_ptr(), tokens, inputs, outputs, _DTYPES[x.dtype]),
            *(multiplier, addend, _X_SCALE),
        )
        self._check(self._lib.qtip_linear(variant, ctypes.byref(args), _stream(x)))

    def transformed(self, x: Tensor, layer: Layer) -> Tensor:
        """x * suh and its Hadamard, times 1/32: float16 [tokens, in]."""
        to = torch.empty(x.shape, dtype=torch.float16, device=x.device)
        with torch.cuda.device(x.device):
            error = self._lib.qtip_input(
                *(_void(x), ctypes.c_int64(x.stride(0)), _void(layer.suh), _void(to)),
                *(len(x), x.shape[1], _DTYPES[x.dtype], ROWS, 1),
                *(ctypes.c_float(_X_SCALE), _stream(x)),
            )
        self._check(error)
        return to

    def dense(
        self, layer: Layer, first: int, count: int, dtype: torch.dtype = torch.float16
    ) -> Tensor:
        """Decoded outputs [first, first + count): [count, in], before signs and Hadamards."""
        inputs, _ = layer.sizes
        to = torch.empty(count, inputs, dtype=dtype, device=layer.weights.device)
        _, multiplier, addend = KINDS[layer.code]
        with torch.cuda.device(to.device):
            self._prepare(to.device)
            error = self._lib.qtip_dense(
                *(_void(layer.weights), _void(to), inputs, first, count, _DTYPES[dtype]),
                *(ctypes.c_uint32(multiplier), ctypes.c_uint32(addend), _void(layer.table)),
                _stream(to),
            )
        self._check(error)
        return to

    def multiply_dense(
        self, x: Tensor, layer: Layer, y: Tensor, bias: Tensor | None = None
    ) -> None:
        """The same for many tokens: decodes as many outputs at once as the cache holds."""
        transformed = self.transformed(x, layer)
        inputs, outputs = layer.sizes
        at_once = max(_BLOCK, _DENSE_BYTES // (2 * inputs) // _BLOCK * _BLOCK)
        for first in range(0, outputs, at_once):
            count = min(at_once, outputs - first)
            z = transformed @ self.dense(layer, first, count).T
            with torch.cuda.device(x.device):
                error = self._lib.qtip_output(
                    *(_void(z), ctypes.c_int64(z.stride(0)), _DTYPES[z.dtype], _void(layer.svh)),
                    *(_void(bias), _void(y), ctypes.c_int64(y.stride(0)), len(x), first, count),
                    *(_DTYPES[y.dtype], ctypes.c_float(_X_SCALE), _stream(x)),
                )
            self._check(error)

    def linear(self, x: Tensor, layer: Layer, y: Tensor, bias: Tensor | None = None) -> None:
        """y = x W' in the fastest way. x [tokens, in], y [tokens, out] of the same dtype."""
        variant = variant_for(len(x), *layer.sizes)
        if variant == DENSE:
            self.multiply_dense(x, layer, y, bias)
        else:
            self.multiply(x, layer, y, bias, variant)

    def _prepare(self, device: torch.device) -> None:
        """Once on each device, which is the current one."""
        if device not in self._prepared:
            self._check(self._lib.qtip_prepare())
            self._prepared.add(device)

    def _check(self, error: int) -> None:
        if error:
            message = self._lib.qtip_error(error).decode()
            raise RuntimeError(f"the qtip kernels: {message} (CUDA error {error})")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _void(tensor: Tensor | None) -> Any:
    return ctypes.c_void_p(_pointer(tensor))


def _stream(tensor: Tensor) -> Any:
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


def defines(bits: int, code: str, lane_order: str) -> tuple[str, ...]:
    """For the compiler: what a library decodes."""
    chosen = {"BITS": bits, "CODE": KINDS[code][0], "ORDER": ORDERS[lane_order]}
    return tuple(f"-DQTIP_{name}={value}" for name, value in chosen.items())
