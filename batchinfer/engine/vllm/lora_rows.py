"""Rows without an adapter, in a step with rows that have one, on a CPU.

vLLM marks them by -1 and takes that for an index: on a CPU they are computed with the adapter in
the last place. Its kernels for GPUs leave them out. Here what goes into those operations is zero
for such rows, so nothing is added to them. Importing this module is all that it takes, in every
process that computes. Must not know: requests, adapters. vLLM 0.26 to 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

#: Those that the others call.
_OPERATIONS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
_MARK = "leaves_rows_without_adapter"


def _of_rows_with_one(operation: Callable[..., None]) -> Callable[..., None]:
    @wraps(operation)
    def masked(
        inputs: torch.Tensor,  # [tokens, features]
        weights: torch.Tensor,
        output: torch.Tensor,
        indices: torch.Tensor,  # [tokens]
        *more: Any,
        **named: Any,
    ) -> None:
        inputs = inputs.masked_fill((indices < 0).unsqueeze(1), 0)
        operation(inputs, weights, output, indices, *more, **named)

    setattr(masked, _MARK, True)
    return masked


for _name in _OPERATIONS:
    _operation = getattr(lora_ops, _name)
    if not hasattr(_operation, _MARK):
        for _module in (lora_ops, torch_ops, punica_cpu):
            setattr(_module, _name, _of_rows_with_one(_operation))
