"""Whether weights are stored as the settings of their quantization say, from headers alone.

Must not know: tensors' values, which name was asked for. Of pytorch_model.bin nothing is known, and
nothing refused; nor is what may be right: a few packed layers among many that stayed as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.weights import Tensor, Weights
from batchinfer.quantization import SCHEMES, Checkpoint

#: What unquantized weights and their buffers are stored as.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16", "BOOL", "I64", "U64")
#: Of an unquantized model's bytes, the most that other buffers take.
_MOST_BUFFERS = 0.05
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
    if checkpoint.scheme not in SCHEMES or not weights.tensors:
        return
    if checkpoint.scheme in ("bnb-4bit", "bnb-8bit"):
        found = _of_bitsandbytes(weights.tensors)
        said = "int8"
        if checkpoint.scheme == "bnb-4bit":
            said = (settings or {}).get("bnb_4bit_quant_type", "fp4")  # transformers' default
        # Others would be dequantized and quantized anew, and lose by it.
        for kind, name in found.items():
            if kind != said:
                raise _contradiction(
                    folder, f"{said} of bitsandbytes, but the tensor {name} belongs to {kind}"
                )
        is_wrong = not found
    else:
        num_bytes = sum(t.num_bytes for t in weights.tensors.values() if _is_packed(t))
        is_wrong = not num_bytes
        if checkpoint.scheme == "plain":
            is_wrong = num_bytes > _MOST_BUFFERS * sum(weights.dtypes.values())
    if is_wrong:
        most = max(weights.dtypes, key=lambda name: weights.dtypes[name])
        raise _contradiction(
            folder, f"{checkpoint.words}, but most of its weights are stored as {most}"
        )


def _contradiction(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: its settings say {what}: config.json and the weights are not of one "
        "checkpoint, copy it again"
    )


def _of_bitsandbytes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Kind of weights -> a tensor that says so.

    Their dtype does not: transformers stores them as any that it is told (bnb_4bit_quant_storage).
    """
    return {
        kind: name
        for name in tensors
        for piece, kind in _BITSANDBYTES_PIECES.items()
        if name.endswith(piece)
    }


def _is_packed(tensor: Tensor) -> bool:
    """Whether it is of a quantized weight, and not an attention mask, as old models store them."""
    *outer, rows, columns = (1, 1, *tensor.shape)
    is_mask = len(tensor.shape) == 4 and rows == columns and set(outer) == {1}
    return tensor.dtype not in _PLAIN_DTYPES and not is_mask
