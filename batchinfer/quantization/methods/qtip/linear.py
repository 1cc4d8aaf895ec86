"""y = x W' of coded layers, as a device computes it: kernels where there are any, else torch.

The seam between an engine and the kernels: which `Backend` a device has is decided once. Engines
call `run_linear`, one opaque operator of torch: compilers see its shapes alone, and
what depends on the number of tokens is chosen inside of it, in each call. Must not know: vLLM.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchinfer.quantization.methods.qtip.torch_backend import (
    Backend,
    Packed,
    TorchBackend,
    say_slow,
)


def packed_of(layer: Any) -> Packed:
    """As an engine's layer keeps it: `qweight`, `qweight_1` and so on, `num_tensors` of them."""
    names = ("qweight", *(f"qweight_{number}" for number in range(1, layer.num_tensors)))
    return Packed([getattr(layer, name) for name in names], layer.plan, layer.num_out)


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


def _kernels(device_type: str) -> Backend | str:
    """The kernels of a device, or why it has none."""
    if device_type == "cuda":
        from batchinfer.quantization.methods.qtip import cuda_backend

        return cuda_backend.why_none() or cuda_backend.CudaBackend()
    if device_type == "cpu":
        from batchinfer.quantization.methods.qtip import cpu_backend

        return cpu_backend.why_none() or cpu_backend.CpuBackend()
    return f"there are no kernels for {device_type}"


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
