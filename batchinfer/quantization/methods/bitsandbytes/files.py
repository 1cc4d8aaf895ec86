"""Checkpoints that transformers writes with bitsandbytes, from their headers alone."""

from __future__ import annotations

from collections.abc import Mapping

from batchinfer.quantization.methods.base import (
    Loading,
    Settings,
    Stored,
    Tensor,
    count_weights,
)

#: In float32 for each block of 64, as our kernels keep them.
BITS_PER_WEIGHT = 4.5

#: What is stored beside a packed weight -> what the weight is. The weight's own dtype does not say
#: so: transformers stores it as any that it is told to (bnb_4bit_quant_storage).
_PIECES = {
    ".SCB": "int8",
    ".quant_state.bitsandbytes__nf4": "nf4",
    ".quant_state.bitsandbytes__fp4": "fp4",
}


def scheme_of(family: str, settings: Settings) -> str:
    return "bnb-8bit" if settings.get("load_in_8bit") else "bnb-4bit"


def check_stored(stored: Stored) -> None:
    """Raise ConfigError for packed weights of another kind than the settings say, or of none.

    Others would be dequantized and quantized again, and lose by it.
    """
    wanted = "int8"
    if stored.scheme == "bnb-4bit":
        wanted = stored.settings.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    kinds = {
        kind: name
        for name in stored.tensors
        for piece, kind in _PIECES.items()
        if name.endswith(piece)
    }
    for kind, name in kinds.items():
        if kind != wanted:
            raise stored.contradiction(
                f"{wanted} of bitsandbytes, but the tensor {name} belongs to {kind}"
            )
    if not kinds:
        raise stored.not_as_said()


def loaded_bytes(loading: Loading, name: str, tensor: Tensor) -> int:
    """With the scales that our plugin keeps in float32, in place of the checkpoint's own."""
    if loading.scheme != "bnb-4bit":
        return tensor.num_bytes
    return round(tensor.num_bytes * BITS_PER_WEIGHT / 4) if name.endswith(".weight") else 0


def step_bytes_per_weight(scheme: str, dtype_bytes: int) -> int:
    """8-bit integers become float32 on the way to the model's dtype."""
    return dtype_bytes + (4 if scheme == "bnb-8bit" else 0)


def count_four_bits(settings: Settings, module: str, parts: Mapping[str, Tensor]) -> int:
    """See `Method.count_weights`. A packed weight may be stored as any dtype."""
    if "weight.absmax" not in parts:
        return count_weights(settings, module, parts)
    others = {name: tensor for name, tensor in parts.items() if not name.startswith("weight")}
    return 2 * parts["weight"].num_bytes + count_weights(settings, module, others)
