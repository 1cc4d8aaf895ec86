"""y = x W' of coded layers, as a device computes it: kernels where there are any, else torch.

The seam between an engine and the kernels. A `Backend` lays the tensors of a layer out for itself
(`pack`, once, while the model loads) and multiplies (`run`). Which one a device has is decided
once. Engines call `run_linear`, one opaque operator of torch: compilers see its shapes alone, and
what depends on the number of tokens is chosen inside of it, in each call. Must not know: vLLM.
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


def packed_of(layer: Any) -> Packed:
    """As an engine's layer keeps it: `qweight`, `qweight_1` and so on, `num_tensors` of them."""
    names = ("qweight", *(f"qweight_{number}" for number in range(1, layer.num_tensors)))
    return Packed([getattr(layer, name) for name in names], layer.plan, layer.num_out)


class Backend(Protocol):
    """What multiplies on one kind of device."""

    name: str

    def pack(self, shards: Sequence[Coded]) -> Packed: ...

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        """[tokens, in], contiguous, any number of tokens -> [tokens, num_out] of the same dtype."""


def run_linear(x: Tensor, packed: Packed) -> Tensor:
    """[..., in] -> [..., num_out], in the dtype of `x`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.ops.batchinfer.qtip_linear(flat, packed.tensors, packed.plan, packed.num_out)
    return y.view(*x.shape[:-1], packed.num_out)


@cache
def backend_for(device_type: str) -> Backend:
    """What multiplies on `cpu` or `cuda` in this process."""
    found = _kernels(device_type)
    if not isinstance(found, str):
        return found
    say_slow(found)
    return TorchBackend()


@cache
def say_slow(reason: str) -> None:
    """Once for each reason."""
    message = "trellis-coded layers are decoded in every step by torch, which is slow: %s"
    log.warning(message, reason)


def _kernels(device_type: str) -> Backend | str:
    """The kernels of a device, or why it has none."""
    if device_type == "cuda":
        from batchinfer.quantization.methods.qtip import cuda_backend

        return cuda_backend.why_none() or cuda_backend.CudaBackend()
    if device_type == "cpu":
        from batchinfer.quantization.methods.qtip import cpu_backend

        return cpu_backend.why_none() or cpu_backend.CpuBackend()
    return f"there are no kernels for {device_type}"


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


def _run(x: Tensor, tensors: list[Tensor], plan: str, num_out: int) -> Tensor:
    if not len(x):  # of an idle worker
        return x.new_empty(0, num_out)
    return backend_for(x.device.type).run(x, Packed(tensors, plan, num_out))


def _run_fake(x: Tensor, tensors: list[Tensor], plan: str, num_out: int) -> Tensor:
    return x.new_empty(x.shape[0], num_out)


#: Kept: its operators go with it.
_LIBRARY = torch.library.Library("batchinfer", "FRAGMENT")
_LIBRARY.define("qtip_linear(Tensor x, Tensor[] tensors, str plan, int num_out) -> Tensor")
_LIBRARY.impl("qtip_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("batchinfer::qtip_linear", _run_fake, lib=_LIBRARY)
