"""Tiles of 16 x 16 weights as walks through the bit-shift trellis, and how their bits are stored.

A tile is a sequence of 256 weights, V to a step (`codes`), K fresh bits to a weight. Each of its
256 / V states has the 16 latest bits of one circular stream of 256 K bits, so a state's low
16 - K V bits are the next one's high ones, and the last one's are the first one's. Two conventions
and two orders exist, and a wrong one gives weights of plausible statistics that are all wrong:

- the *window*: state t is the 16 bits that end with its own fresh ones (EXL3; what is stored here),
  or that begin at its slot (QTIP); the same stream, rotated by 16 - K V bits;
- the *lane order*: where in the tile position p of the sequence is. p = 8 lane + j, lane = 4 (out
  mod 8) + (in mod 8) div 2; j = 4 (out div 8) + 2 (in div 8) + in mod 2 in EXL3, and
  4 (in div 8) + 2 (out div 8) + in mod 2 in QTIP: operands B and A of the tensor cores' m16n8k16.

Stored is EXL3's `trellis`, int16 [in / 16, out / 16, 16 K]: the stream in 32-bit little-endian
words, most significant bit first. Must not know: scales, signs, files.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import STATE_BITS

TILE = 16
TILE_WEIGHTS = TILE * TILE
LANE_ORDERS = ("exl3", "qtip")

#: Tiles that are packed at once: their single bits take a byte each.
_PACKED_AT_ONCE = 1 << 15


def bits_of(trellis: Tensor) -> int:
    """K of stored tiles. Raises ValueError if the last dimension is not 16 K with K from 1 to 8."""
    num_bits, rest = divmod(int(trellis.shape[-1]), TILE)
    if rest or not 1 <= num_bits <= 8:
        raise ValueError(f"a trellis is [in / 16, out / 16, 16 K], K 1 to 8: {list(trellis.shape)}")
    return num_bits


def unpack(trellis: Tensor, num_values: int) -> Tensor:
    """States of stored tiles: int16 [..., 16 K] -> int32 [..., 256 / num_values], 0 to 65535."""
    return states_of_stream(swap_halves(trellis), num_values, "end")


def pack(states: Tensor, num_bits: int) -> Tensor:
    """Stored tiles of circular states: int [..., 256 / V] -> int16 [..., 16 K], on the CPU.

    `num_bits`: K, the bits of a weight. Only the fresh bits of each state are looked at: the others
    must be its neighbour's.
    """
    return swap_halves(stream_of_states(states, num_bits, "end"))


def swap_halves(words: Tensor) -> Tensor:
    """EXL3's stored 16-bit halves <-> the stream's, int16 [..., 16 K]: they swap in pairs."""
    return words.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def states_of_stream(stream: Tensor, num_values: int, window: str) -> Tensor:
    """States of streams: int16 [..., 16 K], first bit highest -> int32 [..., 256 / num_values]."""
    num_bits = bits_of(stream)
    num_step_bits = num_bits * num_values
    first = torch.arange(TILE_WEIGHTS // num_values, device=stream.device) * num_step_bits
    if window == "end":
        first = (first + num_step_bits - STATE_BITS) % (TILE_WEIGHTS * num_bits)
    halves = stream.to(torch.int32) & 0xFFFF
    index = first // STATE_BITS
    high = halves[..., index]
    low = halves[..., (index + 1) % stream.shape[-1]]
    # Where the shift is arithmetic, what it fills in is above the 16 bits that are kept.
    shift = (STATE_BITS - first % STATE_BITS).to(torch.int32)
    return (((high << 16) | low) >> shift) & 0xFFFF


def stream_of_states(states: Tensor, num_bits: int, window: str) -> Tensor:
    """The stream of states [..., 256 / V]: int16 [..., 16 K], first bit highest, on the CPU."""
    num_steps = states.shape[-1]
    num_step_bits = num_bits * TILE_WEIGHTS // num_steps
    lowest = 0 if window == "end" else STATE_BITS - num_step_bits
    shifts = torch.arange(num_step_bits - 1, -1, -1, dtype=torch.int32) + lowest
    parts = []
    for tiles in states.reshape(-1, num_steps).split(_PACKED_AT_ONCE):
        bits = ((tiles.cpu().to(torch.int32).unsqueeze(-1) >> shifts) & 1).to(torch.uint8)
        packed = np.packbits(bits.flatten(1).numpy(), axis=1)
        parts.append(torch.from_numpy(packed.view(">i2").astype(np.int16)))
    return torch.cat(parts).view(*states.shape[:-1], TILE * num_bits)


@cache
def tile_order(lane_order: str) -> Tensor:
    """Position in the sequence of each weight of a tile [in, out], in rows: int64 [256]."""
    if lane_order not in LANE_ORDERS:
        raise ValueError(f"unknown lane order {lane_order!r}: known are {', '.join(LANE_ORDERS)}")
    of_in, of_out = torch.arange(TILE)[:, None], torch.arange(TILE)[None, :]
    lane = 4 * (of_out % 8) + (of_in % 8) // 2
    in_high, out_high = of_in // 8, of_out // 8
    if lane_order == "exl3":
        number = 4 * out_high + 2 * in_high + of_in % 2
    else:
        number = 4 * in_high + 2 * out_high + of_in % 2
    return (8 * lane + number).flatten()


@cache
def _order_on(device: torch.device, lane_order: str) -> Tensor:
    """Kept: a CUDA graph cannot take it from the CPU in each call."""
    return tile_order(lane_order).to(device)


def to_sequences(weights: Tensor, lane_order: str) -> Tensor:
    """A matrix [in, out] as sequences of its tiles: [in / 16, out / 16, 256]."""
    tiles = weights.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)
    in_sequence = tile_order(lane_order).argsort().to(weights.device)
    return tiles.flatten(2)[..., in_sequence]


def from_sequences(sequences: Tensor, lane_order: str) -> Tensor:
    """The matrix [in, out] of sequences [in / 16, out / 16, 256]; `to_sequences` undone."""
    tiles = sequences[..., _order_on(sequences.device, lane_order)]
    return tiles.unflatten(2, (TILE, TILE)).transpose(1, 2).flatten(2).flatten(0, 1)


def decode_tiles(trellis: Tensor, table: Tensor, lane_order: str = "exl3") -> Tensor:
    """The coded matrix, before signs, scales and Hadamards: float16 [in, out].

    `trellis`: as stored, int16 [in / 16, out / 16, 16 K]; `table`: `codes.table`, [65536, V].
    """
    states = unpack(trellis, table.shape[1])
    values = table.to(trellis.device)[states]  # [in / 16, out / 16, 256 / V, V]
    return from_sequences(values.flatten(2), lane_order)
