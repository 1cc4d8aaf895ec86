"""FP8: 8-bit floats with scales for tensors, channels or blocks, and MXFP8."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Device, Method, Quantization, Settings
from batchinfer.quantization.methods.support import quantize_command

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
            cpu=Device(
                schemes=("fp8-block",),
                refused={
                    "fp8-tensor": "vLLM has no CPU kernel that quantizes activations by tensor",
                    "fp8-channel": "vLLM computes it on a CPU with a scalar reference of 30 "
                    "million multiplications a second",
                    "mxfp8": "vLLM has no CPU kernel for it",
                },
                online="fp8_per_block",
                dtypes=("bfloat16",),
                cpu_flags=("amx_tile", "amx_bf16"),
                kernels={"fp8-block": "fp8_scaled_mm_cpu", "plain": "fp8_scaled_mm_cpu"},
            ),
            gpu=Device(
                schemes=("fp8-tensor", "fp8-channel", "fp8-block", "mxfp8"),
                # Scales of channels and tokens are nearer to the model than one of a whole tensor,
                # and faster on an H200; not all of vLLM's kernels for experts and older GPUs know
                # them.
                online="fp8_per_channel",
                online_otherwise="fp8",
                min_capability=(7, 5),
                native_capability=(8, 9),
            ),
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
