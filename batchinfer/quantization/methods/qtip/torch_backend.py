"""What multiplies by coded layers on a device, and the one of them that needs no kernels.

A `Backend` lays the tensors of a layer out for itself (`pack`, once, while the model loads) and
multiplies (`run`). Must not know: engines, which backend a device has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from batchinfer.quantization.methods.qtip.codes import table
from batchinfer.quantization.methods.qtip.dense import Coded, dense_rows, sizes

log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A layer, or several with the same inputs whose outputs are put side by side."""

    tensors: list[Tensor]  # as the backend has laid them out
    plan: str  # what else it has to know; equal for equal layers, so that compilers share code
    num_out: int


class Backend(Protocol):
    """What multiplies on one kind of device."""

    name: str

    def pack(self, shards: Sequence[Coded]) -> Packed: ...

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        """[tokens, in], contiguous, any number of tokens -> [tokens, num_out] of the same dtype."""


@cache
def say_slow(reason: str) -> None:
    """Once for each reason."""
    message = "trellis-coded layers are decoded in every step by torch, which is slow: %s"
    log.warning(message, reason)


class TorchBackend:
    """The reference: decodes some outputs at a time in every call, and multiplies by them."""

    name = "torch"

    def pack(self, shards: Sequence[Coded]) -> Packed:
        tensors: list[Tensor] = []
        plan = []
        for shard in shards:
            fields = shard._asdict()
            named = {name: t for name, t in fields.items() if isinstance(t, Tensor)}
            # A CUDA graph cannot take it from the CPU in each call.
            values = table(shard.code, shard.tlut).to(shard.trellis.device)
            tensors += [*named.values(), values]
            others = {name: fields[name] for name in ("code", "lane_order")}
            plan.append({"tensors": list(named), **others})
        return Packed(tensors, json.dumps(plan), sum(sizes(shard)[1] for shard in shards))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        remaining = iter(packed.tensors)
        outputs = []
        for fields in _parsed(packed.plan):
            others = {name: value for name, value in fields.items() if name != "tensors"}
            named = {name: next(remaining) for name in fields["tensors"]}
            shard, values = Coded(**named, **others), next(remaining)
            outputs += [functional.linear(x, rows) for rows in dense_rows(shard, x.dtype, values)]
        return torch.cat(outputs, -1)


@cache
def _parsed(plan: str) -> Any:
    return json.loads(plan)
