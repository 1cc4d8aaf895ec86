"""Linear layers as walks through a trellis, so that what they compute changes least (BlockLDLQ).

W [out, in] becomes diag(svh) U C U diag(suh), C the coded matrix, U Hadamard transforms of blocks
of 128, suh and svh signs and scales (QuIP#, arXiv 2402.04396; QTIP, arXiv 2406.11235). Layers on
the same inputs share suh, so that one transform of the inputs serves them all. With H the second
moments of the inputs, the loss is tr(E H E'), E the error of W. In C's basis H = L D L', L of unit
blocks of 16: columns are coded in blocks from the last to the first, and each block takes over what
later ones have left, by L. Must not know: files, models, how a walk is found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.making.trellis.viterbi import Search
from batchinfer.quantization.methods.qtip.hadamard import block_hadamard
from batchinfer.quantization.methods.qtip.trellis import (
    TILE,
    TILE_WEIGHTS,
    from_sequences,
    pack,
    to_sequences,
)

logger = logging.getLogger("batchinfer.making")

#: Added to H's diagonal, as a share of its mean: what calibration has not seen is not free.
_DAMPING = 0.025
#: Standard deviation of what is coded, by that of the code: bounded codes want headroom, the more
#: the finer they are. The search tries the factors around it.
_SCALES = {1: 1.0, 2: 0.95, 3: 0.9, 4: 0.85}
_FACTORS = (0.9, 0.95, 1.0, 1.05, 1.1)
_SAMPLED_TILES = 16
#: Rounds of least squares for svh and suh once the walks are found.
_ROUNDS = 2
#: A row or column of nothing, as a share of the mean one.
_LEAST_SCALE = 1e-3


@dataclass(frozen=True, slots=True)
class Coder:
    """A code at a rate. `table`: float [65536, V]."""

    search: Search
    table: Tensor
    num_bits: int

    @property
    def scale(self) -> float:
        """The usual standard deviation of what is coded."""
        spread = float(self.table.float().pow(2).mean().sqrt())
        return spread * _SCALES.get(self.num_bits, min(_SCALES.values()))

    def walks(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """States [in / 16, out / 16, 256 / V] for [out, in], and what they stand for [out, in]."""
        tiles = to_sequences(weights.T, "exl3")  # [in / 16, out / 16, 256]
        states = self.search(tiles.reshape(-1, TILE_WEIGHTS)).view(*tiles.shape[:2], -1)
        values = self.table.to(weights)[states.long()].flatten(2)
        return states, from_sequences(values, "exl3").T


@dataclass(frozen=True, slots=True)
class CodedParts:
    """The tensors of one layer in a checkpoint."""

    trellis: Tensor  # int16 [in / 16, out / 16, 16 K]
    suh: Tensor  # float16 [in]
    svh: Tensor  # float16 [out]
    weight: Tensor  # what they stand for: float32 [out, in]
    #: tr(E H E') / tr(W H W').
    loss: float


def code_layers(
    weights: Sequence[Tensor], moments: Tensor | None, coder: Coder, seed: int
) -> list[CodedParts]:
    """Code layers on the same inputs: each [out, in] float32, sizes multiples of 128.

    `moments`: E[x x'] of the inputs, [in, in], or None if nothing is known of them. `seed` of the
    random signs.
    """
    together = torch.cat(list(weights)).float()
    hessian = damped(moments, together)
    signs = torch.Generator().manual_seed(seed)
    suh = _signs(together.shape[1], signs).to(together) * _input_scales(together, hessian)
    rows = together / suh
    size = _positive(rows.pow(2).mean(1).sqrt())
    svh = _signs(len(rows), signs).to(together) * size
    wanted = block_hadamard(_along_outputs(rows / svh[:, None]))
    scale = coder.scale * _best_factor(wanted, coder)
    states, found = _code(wanted * scale, _in_basis(hessian, suh), coder)
    basis = _along_outputs(block_hadamard(found))  # [out, in]: W is svh * basis * suh
    scales = _refit(together, basis, hessian, suh, svh / scale)
    return list(_parts(weights, states, basis, scales, hessian, coder.num_bits))


def damped(moments: Tensor | None, like: Tensor) -> Tensor:
    """H of the loss; the unit matrix where nothing is known of the inputs, or nothing of use."""
    size = like.shape[1]
    if moments is not None:
        mean = moments.diagonal().mean()
        if moments.isfinite().all() and mean > 0:
            found = (moments / mean).to(like)
            found.diagonal().add_(_DAMPING)
            return found
        logger.warning(
            "the inputs of a layer of %d inputs are %s: each of its weights counts equally",
            size,
            "all zero" if mean == 0 else "not finite",
        )
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0


def _positive(scales: Tensor) -> Tensor:
    least = _LEAST_SCALE * scales.mean()
    return scales.clamp(min=least if least > 0 else 1.0)


def _input_scales(together: Tensor, hessian: Tensor) -> Tensor:
    """What the inputs are multiplied by: sqrt(rms of their weights / their own rms).

    Of all scales these make (mean w^2 / s^2) (mean h s^2) least, the loss of a block whose weights
    are mixed (Cauchy-Schwarz). Of such a size that suh and svh are alike in it.
    """
    weights = _positive(together.pow(2).mean(0).sqrt())
    scales = (weights / hessian.diagonal().sqrt()).sqrt()
    size = (together / scales).pow(2).mean().sqrt()
    return scales * size.clamp(min=1e-12).sqrt()


def _along_outputs(rows: Tensor) -> Tensor:
    """Outputs by their Hadamard transform: of several layers at once, as 128 divides each."""
    return block_hadamard(rows.T).T


def _in_basis(hessian: Tensor, suh: Tensor) -> Tensor:
    scaled = hessian * suh * suh[:, None]
    return block_hadamard(block_hadamard(scaled).T)


def _best_factor(wanted: Tensor, coder: Coder) -> float:
    """By what the usual scale is to be multiplied, for the least error of some tiles."""
    tiles = to_sequences(wanted.T, "exl3").reshape(-1, TILE_WEIGHTS)
    some = tiles[torch.linspace(0, len(tiles) - 1, min(_SAMPLED_TILES, len(tiles))).long()]
    scales = coder.scale * torch.tensor(_FACTORS).to(some)
    scaled = (some * scales[:, None, None]).flatten(0, 1)
    values = coder.table.to(some)[coder.search(scaled).long()].flatten(1)
    errors = (values - scaled).pow(2).view(len(_FACTORS), -1).mean(1) / scales**2
    return _FACTORS[int(errors.argmin())]


def feedback(hessian: Tensor) -> Tensor:
    """L - I of H = L D L', with blocks of 16: [in, in], zero on and above the diagonal's blocks."""
    factor = torch.linalg.cholesky(hessian.double())
    blocks = factor.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
    diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [blocks, 16, 16]
    columns = factor.unflatten(1, (-1, TILE)).transpose(0, 1)  # [blocks, in, 16]
    unit = torch.linalg.solve_triangular(diagonal, columns, upper=False, left=False)
    result = unit.transpose(0, 1).flatten(1)
    result.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).diagonal(dim1=0, dim2=2).zero_()
    return result.float()


def _code(wanted: Tensor, hessian: Tensor, coder: Coder) -> tuple[Tensor, Tensor]:
    """States [in / 16, out / 16, steps] and values [out, in], from the last block to the first."""
    size = wanted.shape[1]
    lower = feedback(hessian)
    error = torch.zeros_like(wanted)
    values = torch.empty_like(wanted)
    states = []
    for first in range(size - TILE, -1, -TILE):
        block = slice(first, first + TILE)
        later = slice(first + TILE, size)
        target = wanted[:, block] + error[:, later] @ lower[later, block]
        found, values[:, block] = coder.walks(target)
        error[:, block] = wanted[:, block] - values[:, block]
        states.append(found[0])
    return torch.stack(states[::-1]), values


def _refit(
    wanted: Tensor, basis: Tensor, hessian: Tensor, suh: Tensor, svh: Tensor
) -> tuple[Tensor, Tensor]:
    """suh and svh of least loss for walks that are found: least squares in turns."""
    target = wanted @ hessian
    for _ in range(_ROUNDS):
        rows = basis * suh
        size = ((rows @ hessian) * rows).sum(1)
        svh = torch.where(size > 0, (target * rows).sum(1) / size, svh)
        columns = basis * svh[:, None]
        system = hessian * (columns.T @ columns)
        system.diagonal().add_(1e-6 * system.diagonal().mean().clamp(min=1e-30))
        suh = torch.linalg.solve(system, (target * columns).sum(0))
    return suh, svh


def _parts(
    weights: Sequence[Tensor],
    states: Tensor,
    basis: Tensor,
    scales: tuple[Tensor, Tensor],
    hessian: Tensor,
    num_bits: int,
) -> Iterator[CodedParts]:
    """What each layer is stored as. Rounded to float16 first, so that `weight` is what is read."""
    suh, svh = (scale.half() for scale in scales)
    first = 0
    for weight in weights:
        rows = slice(first, first + len(weight))
        tiles = slice(rows.start // TILE, rows.stop // TILE)
        first = rows.stop
        coded = basis[rows] * suh.float() * svh[rows, None].float()
        own = max(_loss(weight.float(), hessian), 1e-30)
        yield CodedParts(
            trellis=pack(states[:, tiles], num_bits),
            suh=suh,
            svh=svh[rows],
            weight=coded,
            loss=_loss(weight.float() - coded, hessian) / own,
        )


def _loss(error: Tensor, hessian: Tensor) -> float:
    return float(((error @ hessian) * error).sum())
