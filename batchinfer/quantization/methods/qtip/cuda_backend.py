"""The kernels as a backend of `linear`: found or compiled, laid out at load, run in each step.

A layer's parts (q, k and v; gate and up) that agree in everything are one launch, others a launch
each. A part that the kernels cannot compute is left to the reference. Must not know: vLLM, how a
kernel is called.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import TLUT_BITS
from batchinfer.quantization.methods.qtip.cuda import (
    KINDS,
    ORDERS,
    Layer,
    Library,
    counters_for,
    defines,
    words_of,
)
from batchinfer.quantization.methods.qtip.dense import Coded, sizes
from batchinfer.quantization.methods.qtip.linear import Packed, TorchBackend, say_slow
from batchinfer.quantization.methods.qtip.trellis import bits_of
from batchinfer.quantization.native import (
    CUDA,
    NotCompiled,
    already_compiled,
    compiled,
    user_folder,
)

log = logging.getLogger(__name__)

SOURCE = "cuda/qtip.cu"
#: Compute capability that they are written for (wgmma, bulk copies): H100, H200, GH200.
CAPABILITY = (9, 0)
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
    return Library(compiled(SOURCE, flags, folder, CUDA))


class CudaBackend:
    name = "cuda"

    def __init__(self) -> None:
        self._reference = TorchBackend()

    def pack(self, shards: Sequence[Coded]) -> Packed:
        tensors: list[Tensor] = []
        plan = []
        for group in _alike(shards):
            first = group[0]
            fields = {"bits": bits_of(first.trellis), "code": first.code}
            fields |= {"lane_order": first.lane_order, "num_out": sum(sizes(s)[1] for s in group)}
            reason = _why_not(first)
            if reason is None:
                packed = _laid_out(group)
            else:
                say_slow(reason)
                reference = self._reference.pack(group)
                packed, fields["reference"] = reference.tensors, reference.plan
            plan.append({**fields, "num_tensors": len(packed)})
            tensors += packed
        return Packed(tensors, json.dumps(plan), sum(sizes(shard)[1] for shard in shards))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        y = x.new_empty(len(x), packed.num_out)
        first_tensor = first = 0
        for fields in _parsed(packed.plan):
            tensors = packed.tensors[first_tensor : first_tensor + fields["num_tensors"]]
            part = y[:, first : first + fields["num_out"]]
            if "reference" in fields:
                of_part = Packed(tensors, fields["reference"], fields["num_out"])
                part.copy_(self._reference.run(x, of_part))
            else:
                code, bits, lane_order = (fields[name] for name in ("code", "bits", "lane_order"))
                weights, suh, svh, counters, *tables = tensors
                table = tables[0] if tables else None
                layer = Layer(weights, suh, svh, counters, code, bits, table, lane_order)
                library(bits, code, lane_order).linear(x, layer, part)
            first_tensor += fields["num_tensors"]
            first += fields["num_out"]
        return y


def _alike(shards: Sequence[Coded]) -> Iterator[list[Coded]]:
    """Neighbours that one launch computes: the same code and bits, and signs of inputs."""
    group = [shards[0]]
    for before, shard in pairwise(shards):
        if not _are_alike(before, shard):
            yield group
            group = []
        group.append(shard)
    yield group


def _are_alike(one: Coded, other: Coded) -> bool:
    if (one.code, one.lane_order) != (other.code, other.lane_order):
        return False
    if one.trellis.shape[2] != other.trellis.shape[2] or not torch.equal(one.suh, other.suh):
        return False
    if one.tlut is None or other.tlut is None:
        return one.tlut is other.tlut
    return bool(torch.equal(one.tlut, other.tlut))


def _why_not(layer: Coded) -> str | None:
    if layer.code not in KINDS or layer.lane_order not in ORDERS:
        return f"the kernels do not know the code {layer.code} in the order {layer.lane_order}"
    if layer.tlut is not None and len(layer.tlut) > 1 << TLUT_BITS:
        return f"the kernels' tables have up to {1 << TLUT_BITS} pairs, not {len(layer.tlut)}"
    if layer.full_in is not None or layer.full_out is not None:
        return "the kernels know Hadamards of 128 alone"
    try:
        library(bits_of(layer.trellis), layer.code, layer.lane_order)
    except NotCompiled as error:
        return str(error)
    return None


def _laid_out(group: Sequence[Coded]) -> list[Tensor]:
    """The first tensors of a Layer, and the table if the code has one."""
    first = group[0]
    device = first.trellis.device
    weights = torch.cat([words_of(shard.trellis) for shard in group])
    svh = torch.cat([shard.svh for shard in group]).half()
    counters = counters_for(len(svh), device)
    tensors = [weights, first.suh.half().contiguous(), svh, counters]
    if first.tlut is not None:
        # The index's upper bits are those of a smaller table.
        repeats = (1 << TLUT_BITS) // len(first.tlut)
        tensors.append(first.tlut.half().repeat_interleave(repeats, 0).contiguous())
    return tensors


@cache
def _parsed(plan: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(plan)
    return found
