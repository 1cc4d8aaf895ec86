"""The GPU's kernels as a backend of `linear`.

Found or compiled at the first use, laid out at load, run in each step. Must not know: vLLM,
how a kernel is called.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchinfer.native import (
    CUDA,
    NotCompiled,
    already_compiled,
    compiled,
    user_folder,
)
from batchinfer.quantization.methods.qtip.cuda import (
    KINDS,
    ORDERS,
    Layer,
    Library,
    counters_for,
    defines,
    words_of,
)
from batchinfer.quantization.methods.qtip.dense import Coded
from batchinfer.quantization.methods.qtip.kernel_backend import (
    KernelBackend,
    whole_table,
    why_unknown,
)
from batchinfer.quantization.methods.qtip.trellis import bits_of

log = logging.getLogger(__name__)

SOURCE = "cuda/qtip.cu"
#: Compute capability that they are written for (wgmma, bulk copies): H100, H200, GH200.
CAPABILITY = (9, 0)
#: float16's normal numbers begin at 2^-14, and end below 2^16.
_NORMAL_BITS, _LARGEST_BITS = 14, 15
_ARCH = ("-gencode=arch=compute_90a,code=sm_90a",)


def why_none() -> str | None:
    """Why this process's GPU has no kernels; None if it has."""
    if torch.version.hip:
        return "the kernels are for GPUs of NVIDIA"
    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        wanted, has = (".".join(map(str, version)) for version in (CAPABILITY, found))
        return f"the kernels are for compute capability {wanted}, and this GPU has {has}"
    return None


def flags_for(bits: int, code: str, lane_order: str) -> tuple[str, ...]:
    """For the compiler."""
    return (*_ARCH, *defines(bits, code, lane_order))


@cache
def library(bits: int, code: str, lane_order: str) -> Library:
    """The kernels, compiled at the first use and kept in the user's cache. Raises NotCompiled."""
    flags = flags_for(bits, code, lane_order)
    folder = user_folder()
    if already_compiled(SOURCE, flags, folder, CUDA) is None:
        log.info("compiling the kernels of %d-bit %s weights, once", bits, code)
    file = compiled(SOURCE, flags, folder, CUDA)
    try:
        return Library(file)
    except (OSError, RuntimeError) as error:  # of another system's libraries, or another driver
        raise NotCompiled(f"{file} does not run here: {error}") from error


class CudaBackend(KernelBackend):
    name = "cuda"

    def why_not(self, layer: Coded) -> str | None:
        reason = why_unknown(layer, KINDS, ORDERS)
        if reason is not None:
            return reason
        try:
            library(bits_of(layer.trellis), layer.code, layer.lane_order)
        except NotCompiled as error:
            return str(error)
        return None

    def laid_out(self, group: Sequence[Coded]) -> list[Tensor]:
        """The first tensors of a Layer, and the table if the code has one."""
        first = group[0]
        weights = torch.cat([words_of(shard.trellis) for shard in group])
        suh, svh = balanced(first.suh, torch.cat([shard.svh for shard in group]))
        counters = counters_for(len(svh), first.trellis.device)
        tensors = [weights, suh, svh, counters]
        return tensors if first.tlut is None else [*tensors, whole_table(first.tlut)]

    def multiply(
        self, x: Tensor, tensors: Sequence[Tensor], fields: Mapping[str, Any], y: Tensor
    ) -> None:
        code, bits, lane_order = (fields[name] for name in ("code", "bits", "lane_order"))
        weights, suh, svh, counters, *tables = tensors
        table = tables[0] if tables else None
        layer = Layer(weights, suh, svh, counters, code, bits, table, lane_order)
        library(bits, code, lane_order).linear(x, layer, y)


def balanced(suh: Tensor, svh: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the same product, float16, those of inputs about 1 in the mean.

    The kernels hold inputs times `suh`, divided by 32, in float16: with the 0.02 that EXL3 gives it
    small inputs would be below float16's normal numbers. A power of two goes from one side to the
    other, as far as outputs' scales stay normal numbers (but for the least hundredth of them).
    """
    inputs, outputs = suh.float().abs(), svh.float().abs()
    rms = inputs.square().mean().sqrt()
    if not rms > 0 or not (outputs > 0).any():
        return suh.half().contiguous(), svh.half().contiguous()
    # quantile takes 16 million numbers at most; no layer has as many outputs
    least = float(outputs[outputs > 0].quantile(0.01))
    shift = -round(math.log2(float(rms)))
    shift = min(shift, math.floor(math.log2(least)) + _NORMAL_BITS)
    shift = max(shift, math.ceil(math.log2(float(outputs.max()))) - _LARGEST_BITS)
    factor = 2.0**shift
    return (suh.float() * factor).half().contiguous(), (svh.float() / factor).half().contiguous()
