"""FP4: 4-bit floats in groups, NVFP4 and MXFP4."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Device, Method, Quantization, Settings
from batchinfer.quantization.methods.support import COMPRESSED, quantize_command


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
            cpu="vLLM has no CPU kernel for it",
            gpu=Device(
                schemes=("nvfp4", "mxfp4"),
                made_by="nvfp4",
                min_capability=(8, 0),
                native_capability=(10, 0),
                packages=COMPRESSED,
            ),
            how_to_make=f"{quantize_command('nvfp4')} or mxfp4",
        ),
    ),
    families=("mxfp4", "gpt_oss_mxfp4"),
    scheme_of=_scheme_of,
    hints={
        "4bit": ("nvfp4", "mxfp4"),
        "fp4": ("nvfp4", "mxfp4"),
        "nvfp4": ("nvfp4",),
        "mxfp4": ("mxfp4",),
    },
)
