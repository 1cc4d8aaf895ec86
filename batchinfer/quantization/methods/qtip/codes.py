"""The codes of QTIP and EXL3: what weight a state of the trellis stands for.

A state has 16 bits. Four codes compute a number of unit-like variance from its bits, one (`hyb`)
looks two numbers up in a small table that a checkpoint brings along. The definitions are those of
QTIP (arXiv 2406.11235) and EXL3, in 32-bit integers and in float16, whose rounding is part of them:
a table here holds the very bits that a kernel has to compute. Must not know: how states are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

#: Bits of a state.
STATE_BITS = 16
NUM_STATES = 1 << STATE_BITS

#: Code -> weights that one state stands for.
CODES: Mapping[str, int] = MappingProxyType({"3inst": 1, "mcg": 1, "mul1": 1, "1mad": 1, "hyb": 2})

#: Entries of `hyb`'s table, in bits, as in the published models.
TLUT_BITS = 9
#: Standard deviation of its entries: sqrt(1 - 2^-4).
_TLUT_STD = 0.9682458

#: Multiplier and addend of the congruential step, modulo 2^32.
STEPS = {
    "3inst": (89226354, 64248484),
    "mcg": (0xCBAC1FED, 0),
    "mul1": (0x83DCD12D, 0),
    "1mad": (34038481, 76625530),
}


def table(code: str, tlut: Tensor | None = None) -> Tensor:
    """The weights of all states: float16 [65536, 1 or 2].

    `tlut`: float16 [2^Q, 2], of `hyb` alone. Raises ValueError for an unknown code, and for a
    table that is missing, not the code's or of another shape.
    """
    if code not in CODES:
        raise ValueError(f"unknown code {code!r}: known are {', '.join(CODES)}")
    if (tlut is not None) != (code == "hyb"):
        raise ValueError(f"code {code} takes {'a' if code == 'hyb' else 'no'} table (tlut)")
    if tlut is not None:
        return _hyb(tlut)
    multiplier, addend = STEPS[code]
    states = torch.arange(NUM_STATES, dtype=torch.int64)
    hashed = (states * multiplier + addend) & 0xFFFFFFFF
    if code == "1mad":
        # In float64 and rounded once: the quotients are far from any tie.
        values = (_byte_sums(hashed) - 510).double() / 147.800537109375
        return values.float().half().unsqueeze(1)
    if code == "mul1":
        # A fused multiply-add of float16, 0x6400 + B being the float16 number 1024 + B: product
        # and sum are multiples of 2^-18 below 16 and 4, so exact in float32, then rounded once.
        scale, shift = _half_bits(torch.tensor([0x1EEE, 0xC931])).float()
        return ((_byte_sums(hashed) + 1024).float() * scale + shift).half().unsqueeze(1)
    masked = (hashed & 0x8FFF8FFF) ^ 0x3B603B60
    # Both have exponents from -3 to 0, so their sum is exact in float32, then rounded once.
    return (_half_bits(masked >> 16).float() + _half_bits(masked & 0xFFFF).float()).half()[:, None]


def gaussian_tlut(num_bits: int = TLUT_BITS) -> Tensor:
    """A table for `hyb`: float16 [2^num_bits, 2].

    K-means centres of two-dimensional unit Gaussian samples, of which the first coordinate is
    positive, as a bit of the state gives its sign; scaled to QTIP's standard deviation. Takes a
    second or two. Its last bits may differ among machines: checkpoints bring their table along.
    """
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1 << 15, 2, dtype=torch.float32, generator=generator)
    samples[:, 0].abs_()
    centres = samples[: 1 << num_bits].clone()
    for _ in range(20):
        # The nearest centre c has the least |c|^2 - 2 s.c.
        nearest = torch.addmm((centres**2).sum(1), samples, centres.T, alpha=-2).argmin(1)
        counts = nearest.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, samples)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return (centres * (_TLUT_STD / (centres**2).mean().sqrt())).half()


def _hyb(tlut: Tensor) -> Tensor:
    num_bits = len(tlut).bit_length() - 1
    if tlut.dtype != torch.float16 or tlut.shape != (1 << num_bits, 2) or num_bits > 15:
        raise ValueError(
            f"a table (tlut) is float16 [2^Q, 2], not {str(tlut.dtype).removeprefix('torch.')} "
            f"{list(tlut.shape)}"
        )
    states = torch.arange(NUM_STATES, dtype=torch.int64)
    hashed = states * (states + 1)
    values = tlut.cpu()[(hashed >> (15 - num_bits)) & ((1 << num_bits) - 1)]
    is_negated = (hashed >> 15) & 1 == 1
    values[:, 0] = torch.where(is_negated, -values[:, 0], values[:, 0])
    return values


def _byte_sums(hashed: Tensor) -> Tensor:
    """Sums of the four bytes of 32-bit numbers: int64, 0 to 1020."""
    return sum((hashed >> shift) & 0xFF for shift in (8, 16, 24)) + (hashed & 0xFF)


def _half_bits(bits: Tensor) -> Tensor:
    """The float16 numbers that have these bits."""
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
    return signed.to(torch.int16).view(torch.float16)
