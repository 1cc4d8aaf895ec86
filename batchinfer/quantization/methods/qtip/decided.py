"""Whether a layer is decoded while it is loaded or computed packed, and what the log says of it.

Must not know: vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch

from batchinfer.quantization.methods.qtip import cpu_backend, packed
from batchinfer.quantization.methods.qtip.dense import Coded
from batchinfer.quantization.methods.qtip.loading import LayerPieces

log = logging.getLogger(__name__)


def why_decoded(
    shards: Sequence[Coded], pieces: LayerPieces, *, is_cpu: bool, is_cut_within: bool
) -> str | None:
    """In words, why layers are decoded while they are loaded; None if they are computed packed.

    `is_cut_within`: this device keeps some of the outputs, cut within a block of 128.
    """
    if is_cpu and not packed.is_asked():
        return "on a CPU"
    if is_cpu and (reason := _lacks(shards)):
        return f"on this CPU ({reason})"
    if is_cut_within or any(pieces.is_padded(i, shard) for i, shard in enumerate(shards)):
        return "with sizes that are not multiples of 128"
    if any(shard.full_in is not None or shard.full_out is not None for shard in shards):
        return "with Hadamards of whole sides"
    return None


def _lacks(shards: Sequence[Coded]) -> str | None:
    reasons = (cpu_backend.why_none(), *map(cpu_backend.why_not, shards))
    return next(filter(None, reasons), None)


@cache
def say_packed_on_cpu() -> None:
    log.info("trellis-coded layers stay packed in memory, and the CPU decodes them in every step")


@cache
def say_decoded(reason: str, dtype: torch.dtype) -> None:
    log.log(
        logging.WARNING if packed.is_asked() else logging.INFO,
        "trellis-coded layers %s are decoded into %s while they are loaded: they take the memory "
        "and the time of unquantized ones",
        reason,
        str(dtype).removeprefix("torch."),
    )
