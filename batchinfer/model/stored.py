"""Whether weights are stored as the settings of their quantization say, from headers alone.

Must not know: tensors' values, which name was asked for. Of pytorch_model.bin nothing is known, and
nothing refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.weights import Weights
from batchinfer.quantization import SCHEMES, Checkpoint

#: How quantized weights are stored, and the least share of them among all (embeddings stay).
_PACKED_DTYPES = ("I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0")
_PACKED_SHARE = 0.05
#: What bitsandbytes stores beside a packed weight -> what the weight is.
_BITSANDBYTES_PIECES = {
    ".SCB": "int8",
    ".quant_state.bitsandbytes__nf4": "nf4",
    ".quant_state.bitsandbytes__fp4": "fp4",
}


def check_stored(
    checkpoint: Checkpoint, settings: Mapping[str, Any] | None, weights: Weights, folder: Path
) -> None:
    """Refuse weights that are not what the settings say. Raises ConfigError."""
    num_packed_bytes = sum(weights.dtypes.get(name, 0) for name in _PACKED_DTYPES)
    is_packed = num_packed_bytes > _PACKED_SHARE * sum(weights.dtypes.values())
    is_known = checkpoint.scheme in SCHEMES and bool(weights.dtypes)
    if is_known and is_packed == (checkpoint.scheme == "plain"):
        most = max(weights.dtypes, key=lambda name: weights.dtypes[name])
        raise ConfigError(
            f"{folder}: its settings say {checkpoint.words}, but most of its weights are stored as "
            f"{most}: config.json and the weights are not of one checkpoint, copy it again"
        )
    if checkpoint.scheme in ("bnb-4bit", "bnb-8bit"):
        _check_bitsandbytes(checkpoint, settings or {}, weights, folder)


def _check_bitsandbytes(
    checkpoint: Checkpoint, settings: Mapping[str, Any], weights: Weights, folder: Path
) -> None:
    """Weights of another kind would be dequantized and quantized anew, and lose by it."""
    said = "int8"
    if checkpoint.scheme == "bnb-4bit":
        said = settings.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    for name in weights.tensors:
        found = next((k for piece, k in _BITSANDBYTES_PIECES.items() if name.endswith(piece)), said)
        if found != said:
            raise ConfigError(
                f"{folder}: its settings say {said} of bitsandbytes, but the tensor {name} belongs "
                f"to {found}: config.json and the weights are not of one checkpoint, copy it again"
            )
