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


def coded_matrix(
    tiles: dict[tuple[int, int], list[int]],
    code: str,
    lane_order: str,
    tlut: Sequence[Sequence[float]] | None = None,
) -> list[list[float]]:
    """[in][out] of states by the tile's place, (in / 16, out / 16)."""
    num_in = 16 * (1 + max(i for i, _ in tiles))
    num_out = 16 * (1 + max(j for _, j in tiles))
    matrix = [[0.0] * num_out for _ in range(num_in)]
    for (i, j), states in tiles.items():
        values = [value for s in states for value in state_values(code, s, tlut)]
        for position, value in enumerate(values):
            of_in, of_out = place(lane_order, position)
            matrix[16 * i + of_in][16 * j + of_out] = value
    return matrix


def times_hadamard(row: Sequence[float], odd: Sequence[Sequence[int]] | None) -> list[float]:
    """U row. Without `odd` in blocks of 128, else U = (odd x Sylvester) / sqrt(n)."""
    if odd is None:
        blocks = [row[i : i + 128] for i in range(0, len(row), 128)]
        return [value for block in blocks for value in times_hadamard(block, [[1]])]
    width = len(row) // len(odd)
    parts = [walsh(row[i : i + width]) for i in range(0, len(row), width)]
    found = []
    for signs in odd:
        for column in range(width):
            found.append(sum(sign * part[column] for sign, part in zip(signs, parts, strict=True)))
    return [value / len(row) ** 0.5 for value in found]


def walsh(row: Sequence[float]) -> list[float]:
    """Sylvester's matrix times a row: two halves, their sum and their difference."""
    if len(row) == 1:
        return list(row)
    half = len(row) // 2
    first, second = walsh(row[:half]), walsh(row[half:])
    return [a + b for a, b in zip(first, second, strict=True)] + [
        a - b for a, b in zip(first, second, strict=True)
    ]


def weight(
    coded: list[list[float]],
    suh: Sequence[float],
    svh: Sequence[float],
    odd_in: Sequence[Sequence[int]] | None = None,
    odd_out: Sequence[Sequence[int]] | None = None,
) -> list[list[float]]:
    """[out][in] in the basis of the activations."""
    by_in = [times_hadamard(row, odd_out) for row in coded]  # [in][out]
    rows = [times_hadamard(row, odd_in) for row in zip(*by_in, strict=True)]  # [out][in]
    return [
        [value * a * b for value, a in zip(row, suh, strict=True)]
        for row, b in zip(rows, svh, strict=True)
    ]


def swizzled_bytes(
    stored: bytes, num_out: int, num_in: int, num_bits: int
) -> dict[tuple[int, int], list[int]]:
    """Streams of tiles (out / 16, in / 16) of QTIP's layout for its fast kernel.

    Byte q of lane l is the q-th lowest of the integer of the lane's 8 K bits.
    """
    streams = {}
    for mi in range(num_out // 16):
        for ni in range(num_in // 16):
            bits = []
            for lane in range(32):
                integer = 0
                for q in range(num_bits):
                    block = ((mi // 2) * (num_in // 32) + ni // 2) * 32 + lane
                    offset = (block * 4 + (ni % 2) * 2 + mi % 2) * num_bits + q
                    integer |= stored[offset] << 8 * q
                bits += [integer >> (8 * num_bits - 1 - b) & 1 for b in range(8 * num_bits)]
            streams[mi, ni] = bits
    return streams
