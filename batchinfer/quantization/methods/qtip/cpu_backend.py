"""The CPU's kernels as a backend of `linear`.

Found or compiled at the first use, laid out at load, run in each step. Must not know: vLLM,
how a kernel is called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchinfer.native import (
    NotCompiled,
    already_compiled,
    compiled,
    cpu_flags,
    user_folder,
)
from batchinfer.quantization.methods.qtip.cpu import (
    KINDS,
    ORDERS,
    Layer,
    Library,
    pairs_of,
    words_of,
)
from batchinfer.quantization.methods.qtip.dense import Coded
from batchinfer.quantization.methods.qtip.kernel_backend import (
    KernelBackend,
    whole_table,
    why_unknown,
)
from batchinfer.quantization.methods.qtip.packed import SOURCE, flags_for, why_not_packed

log = logging.getLogger(__name__)


@cache
def why_none() -> str | None:
    """Why this process has no kernels; None if it has. The first call may compile them."""
    reason = why_not_packed(cpu_flags())
    if reason is not None:
        return reason
    try:
        library()
    except (NotCompiled, OSError) as error:  # or another machine's library does not load here
        return str(error)
    return None


def why_not(layer: Coded) -> str | None:
    """Why the kernels cannot compute such a layer; None if they can."""
    return why_unknown(layer, KINDS, ORDERS)


@cache
def library() -> Library:
    """The kernels, compiled at the first use and kept in the user's cache. Raises NotCompiled."""
    flags, folder = flags_for(cpu_flags()), user_folder()
    if already_compiled(SOURCE, flags, folder) is None:
        log.info("compiling the CPU's kernels for trellis-coded weights, once")
    return Library(compiled(SOURCE, flags, folder))


class CpuBackend(KernelBackend):
    name = "cpu"

    def why_not(self, layer: Coded) -> str | None:
        return why_not(layer)

    def laid_out(self, group: Sequence[Coded]) -> list[Tensor]:
        """The tensors of a Layer, the last of them if the code has a table."""
        first = group[0]
        weights = torch.cat([words_of(shard.trellis) for shard in group])
        svh = torch.cat([shard.svh.float() for shard in group])
        tensors = [weights, first.suh.float().contiguous(), svh]
        return tensors if first.tlut is None else [*tensors, pairs_of(whole_table(first.tlut))]

    def multiply(
        self, x: Tensor, tensors: Sequence[Tensor], fields: Mapping[str, Any], y: Tensor
    ) -> None:
        weights, suh, svh, *tables = tensors
        table = tables[0] if tables else None
        layer = Layer(weights, suh, svh, fields["code"], table, fields["lane_order"])
        library().linear(x, layer, y)
