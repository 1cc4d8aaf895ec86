"""QTIP and EXL3 bit by bit, in plain Python: what the tests hold the package against.

Written from the definitions of the formats alone; shares no code with the package, and is as slow
as it is plain. Floats are Python's, rounded to float16 only where the definition says so.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence


def half_of_bits(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def to_half(value: float) -> float:
    """The nearest float16, ties to even."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


def state_values(code: str, s: int, tlut: Sequence[Sequence[float]] | None = None) -> list[float]:
    """The one or two weights of state s."""
    if code in ("3inst", "mcg"):
        x = 89226354 * s + 64248484 if code == "3inst" else 0xCBAC1FED * s
        y = (x % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
        return [to_half(half_of_bits(y >> 16) + half_of_bits(y & 0xFFFF))]
    if code == "mul1":
        x = 0x83DCD12D * s % 2**32
        counted = half_of_bits(0x6400 + sum(x.to_bytes(4, "little")))
        return [to_half(counted * half_of_bits(0x1EEE) + half_of_bits(0xC931))]
    if code == "1mad":
        x = (34038481 * s + 76625530) % 2**32
        return [to_half((sum(x.to_bytes(4, "little")) - 510) / 147.8005371)]
    assert code == "hyb" and tlut is not None
    num_bits = len(tlut).bit_length() - 1
    h = s * (s + 1)
    first, second = tlut[(h >> (15 - num_bits)) % 2**num_bits]
    return [-first if h >> 15 & 1 else first, second]


def exl3_bits(words: Sequence[int]) -> list[int]:
    """The circular stream of one tile of `trellis`, 16-bit words in stored order (any sign)."""
    raw = b"".join(struct.pack("<H", word & 0xFFFF) for word in words)
    bits = []
    for (word,) in struct.iter_unpack("<I", raw):
        bits += [word >> (31 - i) & 1 for i in range(32)]
    return bits


def plain_bits(words: Sequence[int]) -> list[int]:
    """The stream of 16-bit words, the highest bit first: QTIP's where it is not swizzled."""
    return [(word & 0xFFFF) >> (15 - i) & 1 for word in words for i in range(16)]


def window(bits: Sequence[int], first: int) -> int:
    """The 16 bits from `first` on, of a circular stream."""
    state = 0
    for i in range(16):
        state = 2 * state + bits[(first + i) % len(bits)]
    return state


def exl3_states(bits: Sequence[int], num_step_bits: int) -> list[int]:
    """State t ends with slot t."""
    num_steps = len(bits) // num_step_bits
    return [window(bits, (t + 1) * num_step_bits - 16) for t in range(num_steps)]


def qtip_states(bits: Sequence[int], num_step_bits: int) -> list[int]:
    """State t begins at slot t."""
    return [window(bits, t * num_step_bits) for t in range(len(bits) // num_step_bits)]


def place(lane_order: str, position: int) -> tuple[int, int]:
    """(in, out) within the tile of a position in the sequence."""
    lane, j = divmod(position, 8)
    group, pair = divmod(lane, 4)
    if lane_order == "exl3":
        out_high, in_high, in_low = j >> 2 & 1, j >> 1 & 1, j & 1
    else:
        in_high, out_high, in_low = j >> 2 & 1, j >> 1 & 1, j & 1
    return 8 * in_high + 2 * pair + in_low, 8 * out_high + group


def hadamard(size: int) -> list[list[int]]:
    """Sylvester's, without its 1 / sqrt(size)."""
    return [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
