"""ModelOpt: one family of settings, `quant_algo`, for schemes of FP8 and FP4."""

from __future__ import annotations

from batchinfer.quantization.methods.base import MIXED, Method, Settings

_ALGORITHMS = {
    "fp8": "fp8-tensor",
    "fp8_per_channel_per_token": "fp8-channel",
    "fp8_pb_wo": "fp8-block",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "w4a16_nvfp4": "nvfp4",
    "mixed_precision": MIXED,
}


def _scheme_of(family: str, settings: Settings) -> str:
    algorithm = str(settings.get("quant_algo") or settings["quantization"]["quant_algo"])
    return _ALGORITHMS.get(algorithm.lower(), f"quant_algo {algorithm}")


METHOD = Method(name="modelopt", families=("modelopt*",), scheme_of=_scheme_of)
