"""Orthogonal Hadamard transforms, which spread a weight's outliers over its neighbours.

Ours and EXL3's are of blocks of 128, on both sides of a weight, so that a multiple of 128 inputs
or outputs can be computed by itself (tensor parallel); QTIP's own models have one over the whole
side. Must not know: codes, files.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

BLOCK = 128


def block_hadamard(values: Tensor) -> Tensor:
    """Each 128 neighbours of the last dimension by H / sqrt(128), in float32. Undoes itself.

    Raises ValueError for a size that 128 does not divide.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"{values.shape[-1]} is not a multiple of {BLOCK}")
    matrix = sylvester(BLOCK, values.device) / math.sqrt(BLOCK)
    return (values.float().unflatten(-1, (-1, BLOCK)) @ matrix).flatten(-2)


@cache
def sylvester(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Sylvester's matrix of 1 and -1 in natural order: float32 [size, size], a power of two.

    Kept: a CUDA graph cannot take it from the CPU in each call.
    """
    # Engines set other default dtypes while they load a model.
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float32, device=device)
    while len(matrix) < size:
        matrix = torch.kron(matrix, pair)
    return matrix


def is_hadamard(matrix: Tensor) -> bool:
    """Whether it is [q, q] of 1 and -1, and its rows are orthogonal."""
    size, values = len(matrix), matrix.float()
    if matrix.shape != (size, size) or not bool((values.abs() == 1).all()):
        return False
    unit = torch.eye(size, dtype=torch.float32, device=values.device)
    return bool((values @ values.T == size * unit).all())


def full_hadamard(values: Tensor, odd: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """The last dimension, n = q 2^p, by U = (odd x Sylvester) / sqrt(n) in float32: U values.

    `odd`: the q x q Hadamard matrix of 1 and -1; None: n is a power of two. `inverse`: by U's
    transpose. Raises ValueError if n is not q 2^p.
    """
    size = values.shape[-1]
    num_odd = 1 if odd is None else len(odd)
    width = size // num_odd
    if width * num_odd != size or width & (width - 1):
        raise ValueError(f"{size} is not {num_odd} times a power of two")
    found = values.float().unflatten(-1, (num_odd, width))
    half = 1
    while half < width:  # butterflies: a Sylvester matrix of a whole side would not fit
        pairs = found.unflatten(-1, (-1, 2, half))
        even, uneven = pairs.select(-2, 0), pairs.select(-2, 1)
        found = torch.stack((even + uneven, even - uneven), -2).flatten(-3)
        half *= 2
    if odd is not None:
        matrix = odd.to(found).T if inverse else odd.to(found)
        found = matrix @ found
    return found.flatten(-2) / math.sqrt(size)
