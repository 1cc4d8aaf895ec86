"""What backends with kernels of their own have in common: parts of a layer, and launches.

A layer's parts (q, k and v; gate and up) that agree in everything are one launch, others a launch
each. A part that the kernels cannot compute is left to the reference. Must not know: vLLM, devices.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import TLUT_BITS
from batchinfer.quantization.methods.qtip.dense import Coded, sizes
from batchinfer.quantization.methods.qtip.torch_backend import Packed, TorchBackend, say_slow
from batchinfer.quantization.methods.qtip.trellis import bits_of


class KernelBackend(ABC):
    """See `Backend`."""

    name: str

    def __init__(self) -> None:
        self._reference = TorchBackend()

    @abstractmethod
    def why_not(self, layer: Coded) -> str | None:
        """Why the kernels cannot compute such a layer; None if they can."""

    @abstractmethod
    def laid_out(self, group: Sequence[Coded]) -> list[Tensor]:
        """The tensors of shards that are alike, as the kernels read them."""

    @abstractmethod
    def multiply(
        self, x: Tensor, tensors: Sequence[Tensor], fields: Mapping[str, Any], y: Tensor
    ) -> None:
        """y = x W'. `tensors`: `laid_out`; `fields`: bits, code and lane_order."""

    def pack(self, shards: Sequence[Coded]) -> Packed:
        tensors: list[Tensor] = []
        plan = []
        for group in _alike(shards):
            first = group[0]
            fields = {"bits": bits_of(first.trellis), "code": first.code}
            fields |= {"lane_order": first.lane_order, "num_out": sum(sizes(s)[1] for s in group)}
            reason = self.why_not(first)
            if reason is None:
                packed = self.laid_out(group)
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
                self.multiply(x, tensors, fields, part)
            first_tensor += fields["num_tensors"]
            first += fields["num_out"]
        return y


def why_unknown(layer: Coded, codes: Mapping[str, Any], orders: Mapping[str, Any]) -> str | None:
    """Why kernels that know these codes and orders cannot compute such a layer."""
    if layer.code not in codes or layer.lane_order not in orders:
        return f"the kernels do not know the code {layer.code} in the order {layer.lane_order}"
    if layer.tlut is not None and len(layer.tlut) > 1 << TLUT_BITS:
        return f"the kernels' tables have up to {1 << TLUT_BITS} pairs, not {len(layer.tlut)}"
    if layer.full_in is not None or layer.full_out is not None:
        return "the kernels know only Hadamards of 128"
    return None


def whole_table(tlut: Tensor) -> Tensor:
    """float16 [512, 2] of a table that may be smaller: its index is the upper bits."""
    return tlut.half().repeat_interleave((1 << TLUT_BITS) // len(tlut), 0).contiguous()


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


@cache
def _parsed(plan: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(plan)
    return found
