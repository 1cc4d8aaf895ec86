"""FP8: 8-bit floats with scales for tensors, channels or blocks, and MXFP8."""

from __future__ import annotations

from batchinfer.quantization.methods.base import (
    Method,
    Quantization,
    Settings,
    quantize_command,
)

_SCHEMES = {
    "fp8-tensor": "FP8 with a scale for each tensor",
    "fp8-channel": "FP8 with a scale for each channel",
    "fp8-block": "FP8 with a scale for each block",
    "mxfp8": "MXFP8",
}


def _scheme_of(family: str, settings: Settings) -> str:
    if family == "mxfp8":
        return "mxfp8"
    return "fp8-block" if settings.get("weight_block_size") else "fp8-tensor"


METHOD = Method(
    name="fp8",
    schemes=_SCHEMES,
    names=(
        Quantization(
            name="fp8",
            meaning="8-bit float weights and activations, from a checkpoint or on the fly",
            bits_per_weight=8.0,
            schemes=("fp8-block", "fp8-tensor", "fp8-channel", "mxfp8"),
            takes_plain=True,
            how_to_make=quantize_command("fp8"),
        ),
    ),
    families=("fp8", "mxfp8"),
    scheme_of=_scheme_of,
    hints={
        "fp8": tuple(_SCHEMES),
        "8bit": tuple(_SCHEMES),
        "w8a8": tuple(_SCHEMES),
        "mxfp8": ("mxfp8",),
    },
)
