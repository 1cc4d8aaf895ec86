"""What a model will take of a device's memory, from headers and sizes alone.

Weights as they are once loaded, the KV cache of a token, and what one engine step holds besides.
The estimates are from above where they are not exact. What depends on the engine is in its own
table (`support`). Must not know: any engine, how much memory a machine has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.model.shape import DTYPE_BYTES, Shape
from batchinfer.quantization import (
    TABLE,
    Checkpoint,
    Choice,
    Loading,
    Machine,
    Tensor,
    can_run,
    method_by_name,
    method_of,
    record_of,
    support_of,
)

#: Dtypes in which a checkpoint keeps numbers that are cast to the model's own.
_FLOATS = ("F64", "F32", "F16", "BF16")
_NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "norm", "conv")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, on all devices together."""

    weights: int
    kv_per_token: int
    step_per_token: int  # of the tokens that one step computes
    logits_per_row: int  # of the sequences that one step samples
    num_heads: int  # the number of devices divides it
    num_kv_shards: int  # that the KV cache can be cut into; more devices keep copies
    smaller: Mapping[str, int]  # names of quantizations that this machine can run -> weights
    dequantized: int = 0  # of the widest layer, where a step dequantizes weights
    packed: int | None = None  # weights, if a CPU that can keeps them packed
    caches_all_tokens: bool = False  # `kv_per_token` is not an estimate from above
    num_layers: int = 1
    at_ends: int = 0  # of the weights: what is before the first layer and after the last one
    at_one_end: int = 0  # the larger of the two
    num_linear: int = 0  # numbers of unquantized linear layers; 0: not counted


def needs_of(
    tensors: Mapping[str, Tensor],
    shape: Shape,
    checkpoint: Checkpoint,
    choice: Choice,
    *,
    asked_dtype: str | None,
    kv_per_token: int,
    machine: Machine,
) -> Needs:
    """`choice`: what runs. `asked_dtype`: None if it may be chosen."""
    scheme, name, dtype = checkpoint.scheme, choice.name, choice.dtype
    loading = Loading(scheme, machine.device, DTYPE_BYTES[dtype])
    multiple = support_of(machine).vocabulary_multiple
    linear, other, packed = _weights(tensors, shape, loading, multiple)
    is_online = scheme == "plain" and name != "none"
    bits = record_of(name).bits_per_weight if is_online else 8.0 * DTYPE_BYTES[dtype]
    smaller = {}
    if scheme == "plain":
        smaller = {
            record.name: other + round(linear * record.bits_per_weight / 8)
            for record in TABLE
            if record.bits_per_weight < bits
            and (record.takes_plain or record.dtype)
            and can_run(record.name, checkpoint, machine, asked_dtype)
        }
    weights = other + packed + round(linear * bits / 8)
    of_vocabulary = shape.vocab_size * shape.hidden_size * DTYPE_BYTES[dtype]
    return Needs(
        weights=weights,
        packed=_packed_bytes(tensors, shape, loading, weights, machine),
        kv_per_token=kv_per_token,
        step_per_token=_step_bytes(shape) * DTYPE_BYTES[dtype],
        logits_per_row=shape.vocab_size * (DTYPE_BYTES[dtype] + support_of(machine).logit_bytes),
        num_heads=shape.num_heads,
        num_kv_shards=1 if shape.latent_size else shape.num_kv_heads,
        smaller=dict(sorted(smaller.items(), key=lambda item: -item[1])),
        dequantized=_dequantized_bytes(shape, name, scheme, DTYPE_BYTES[dtype]),
        caches_all_tokens=shape.caches_all_tokens,
        num_linear=linear if scheme == "plain" else 0,
        num_layers=shape.num_layers,
        at_ends=of_vocabulary if shape.is_tied else 2 * of_vocabulary,
        at_one_end=of_vocabulary,
    )


def _packed_bytes(
    tensors: Mapping[str, Tensor], shape: Shape, loading: Loading, decoded: int, machine: Machine
) -> int | None:
    """See `Needs.packed`. `decoded`: what the weights take else."""
    method = method_of(loading.scheme)
    if method is None or method.why_not_packed is None or machine.device != "cpu":
        return None
    if method.why_not_packed(machine.cpu_flags) is not None:
        return None
    multiple = support_of(machine).vocabulary_multiple
    _, other, packed = _weights(tensors, shape, loading._replace(keeps_packed=True), multiple)
    return other + packed if other + packed < decoded else None


def _weights(
    tensors: Mapping[str, Tensor], shape: Shape, loading: Loading, vocabulary_multiple: int
) -> tuple[int, int, int]:
    """(numbers of unquantized linear layers, bytes of what stays so, bytes of packed layers)"""
    linear = other = packed = 0
    packed_modules = set()
    method = method_of(loading.scheme)
    if loading.scheme != "plain":  # whose integers are buffers
        packed_modules = {_module(n) for n, t in tensors.items() if t.dtype not in _FLOATS}
    for name, tensor in tensors.items():
        if _module(name) in packed_modules:
            packed += method.loaded_bytes(loading, name, tensor) if method else tensor.num_bytes
            continue
        if name.startswith("lm_head.") and shape.is_tied:
            continue
        size = math.prod(tensor.shape)
        if tensor.shape and tensor.shape[0] == shape.vocab_size:
            size += size // shape.vocab_size * (-shape.vocab_size % vocabulary_multiple)
        is_linear = (name.endswith(".weight") and len(tensor.shape) == 2) or ".experts." in name
        if is_linear and not any(word in name for word in _NOT_LINEAR):
            linear += size
        else:
            other += size * loading.dtype_bytes
    return linear, other, packed


def _module(name: str) -> str:
    """What a tensor belongs to; some methods write `module.weight.absmax`."""
    module, separator, _ = name.partition(".weight.")
    return module if separator else name.rpartition(".")[0]


def _step_bytes(shape: Shape) -> int:
    """Numbers that a layer holds of one token at its widest.

    Residual and normed input, and either the MLP's gate, up and their product, or queries, keys,
    values and what attention makes of the queries: a Llama's tensors, none of them freed
    before the next is made.
    """
    queries = shape.num_heads * shape.head_size
    values = shape.num_kv_heads * shape.head_size
    attention = 2 * queries + 2 * (shape.latent_size or values)
    return 2 * shape.hidden_size + max(3 * shape.intermediate_size, attention)


def _dequantized_bytes(shape: Shape, name: str, scheme: str, dtype_bytes: int) -> int:
    """Bytes of the widest layer once dequantized: gate and up as one, and so Q, K and V."""
    method = method_by_name(name)
    if method is None:
        return 0
    values = shape.num_kv_heads * shape.head_size
    queries = shape.num_heads * shape.head_size
    num_out = max(2 * shape.intermediate_size, queries + 2 * values)
    return shape.hidden_size * num_out * method.step_bytes_per_weight(scheme, dtype_bytes)
