"""FP4: 4-bit floats in groups, NVFP4 and MXFP4."""

from __future__ import annotations

from batchinfer.quantization.methods.base import (
    Method,
    Quantization,
    Settings,
    quantize_command,
)


def _scheme_of(family: str, settings: Settings) -> str:
    return "mxfp4"


METHOD = Method(
    name="fp4",
    schemes={"nvfp4": "NVFP4", "mxfp4": "MXFP4"},
    names=(
        Quantization(
            name="fp4",
            meaning="4-bit float weights, NVFP4 or MXFP4 (compressed-tensors, ModelOpt)",
            bits_per_weight=4.5,
            schemes=("nvfp4", "mxfp4"),
            takes_plain=True,
            how_to_make=f"{quantize_command('nvfp4')} or mxfp4",
        ),
    ),
    families=("mxfp4", "gpt_oss_mxfp4"),
    scheme_of=_scheme_of,
    weight_parts=("(.*_)?(scales|blocks)",),
    hints={
        "4bit": ("nvfp4", "mxfp4"),
        "fp4": ("nvfp4", "mxfp4"),
        "nvfp4": ("nvfp4",),
        "mxfp4": ("mxfp4",),
    },
)
