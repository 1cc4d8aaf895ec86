"""No quantization: `none`, and the names that mean one dtype of unquantized weights."""

from __future__ import annotations

from batchinfer.quantization.methods.base import (
    Method,
    Quantization,
    Stored,
)

#: Of an unquantized model's bytes, the most that other buffers take.
_MOST_BUFFERS = 0.05


def _name(name: str, meaning: str, bits: float, dtype: str | None = None) -> Quantization:
    return Quantization(
        name=name,
        meaning=meaning,
        bits_per_weight=bits,
        schemes=("plain",),
        dtype=dtype,
        how_to_make="any unquantized checkpoint",
    )


def _check_stored(stored: Stored) -> None:
    num_bytes = sum(tensor.num_bytes for tensor in stored.tensors.values() if tensor.is_packed)
    if num_bytes > _MOST_BUFFERS * sum(stored.dtypes.values()):
        raise stored.not_as_said()


METHOD = Method(
    name="unquantized",
    schemes={"plain": "unquantized"},
    names=(
        _name("none", "unquantized, in `model.dtype`", 16),
        _name("fp32", "unquantized, float32", 32, "float32"),
        _name("fp16", "unquantized, float16", 16, "float16"),
        _name("bf16", "unquantized, bfloat16", 16, "bfloat16"),
    ),
    check_stored=_check_stored,
)
