"""What a model has to do for a token: operations and bytes, from its sizes.

A mixture of experts computes those of a token, and a step is taken to read all of them. Where some
layers do not keep every token, attention is left out, so that the roof is never too low. Must not
know: devices, runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.model import ModelFacts
from batchinfer.model.shape import DTYPE_BYTES, Shape
from batchinfer.verdict.peaks import Precision


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Of the whole model, on however many devices."""

    token_flops: float  # of a token in the linear layers
    logits_flops: float  # of a token whose logits are computed
    context_flops: float  # of a token in attention, for each token of its context
    weights_bytes: float  # read by each step
    kv_bytes: float  # of a token of the context, read by each step that decodes
    linear: Precision
    attention: Precision
    has_all_logits: bool = False  # of prompts too


def work_of(
    model: ModelFacts, *, linear: Precision | None = None, has_all_logits: bool = False
) -> ModelWork | None:
    """None where the sizes do not tell: latent attention, or nothing known of the shape.

    `linear`: what the products of linear layers are made in, if the engine says.
    """
    shape = model.shape
    if shape is None or shape.latent_size:
        return None
    own: Precision = "float32" if model.dtype == "float32" else "16 bit"
    output = shape.hidden_size * shape.vocab_size
    num_linear = _linear_numbers(shape, model.needs.num_linear if model.needs else 0)
    dtype_bytes = DTYPE_BYTES[model.dtype]
    weights = num_linear * _bytes_of_weight(model.quantization, dtype_bytes) + output * dtype_bytes
    if model.needs is not None:
        weights = model.needs.weights - (0 if shape.is_tied else output * dtype_bytes)
    attends = shape.caches_all_tokens
    queries = shape.num_heads * shape.head_size
    return ModelWork(
        token_flops=2.0 * num_linear,
        logits_flops=2.0 * output,
        context_flops=4.0 * shape.num_layers * queries if attends else 0.0,
        weights_bytes=max(0.0, weights),
        kv_bytes=float(model.kv_bytes_per_token) if attends else 0.0,
        linear=linear or {"fp8": "fp8", "int8": "int8"}.get(model.quantization, own),  # type: ignore[arg-type]
        attention=own,
        has_all_logits=has_all_logits,
    )


def _linear_numbers(shape: Shape, counted: int) -> int:
    """Numbers of the linear layers that a token is multiplied with: by the shape of a gated model;
    what the checkpoint counts may be less (no gate), and of all experts is more.
    """
    queries = shape.num_heads * shape.head_size
    values = shape.num_kv_heads * shape.head_size
    attention = 2 * shape.hidden_size * (queries + values)
    numbers = shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    return min(numbers, counted) if counted else numbers


def _bytes_of_weight(quantization: str, dtype_bytes: int) -> float:
    """Where no checkpoint was looked at; what is not known to be smaller is as computed."""
    return 1.0 if quantization in ("fp8", "int8") else dtype_bytes
