"""ModelOpt: one family of settings, `quant_algo`, for schemes of FP8 and FP4."""

from __future__ import annotations

from collections.abc import Mapping

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


def _unnamed_family(settings: Settings) -> str:
    return "modelopt" if settings.get("quant_algo") else ""


def _is_own(family: str) -> bool:
    """Its files may name no family."""
    return not family or family.startswith("modelopt")


def _inner(settings: Settings) -> Settings:
    """In its own file everything is below one key."""
    inner = settings.get("quantization")
    return inner if isinstance(inner, Mapping) else settings


def _is_cache_only(family: str, settings: Settings) -> bool:
    if not _is_own(family):
        return False
    inner = _inner(settings)
    is_said = settings.get("kv_cache_scheme") or inner.get("kv_cache_quant_algo")
    return bool(is_said) and not settings.get("config_groups") and not inner.get("quant_algo")


def _kv_cache_of(family: str, settings: Settings) -> str:
    """Engines read it only where weights are quantized too."""
    inner = _inner(settings)
    if not _is_own(family) or not inner.get("quant_algo"):
        return "auto"
    scheme = inner.get("kv_cache_scheme") or settings.get("kv_cache_scheme")
    algorithm = scheme or inner.get("kv_cache_quant_algo")
    if isinstance(algorithm, Mapping):
        is_float8 = (algorithm.get("num_bits"), algorithm.get("type")) == (8, "float")
        return "fp8" if is_float8 and algorithm.get("dynamic") is False else "auto"
    return "fp8" if str(algorithm).lower() == "fp8" else "auto"


METHOD = Method(
    name="modelopt",
    families=("modelopt*",),
    settings_file="hf_quant_config.json",
    scheme_of=_scheme_of,
    unnamed_family=_unnamed_family,
    is_cache_only=_is_cache_only,
    kv_cache_of=_kv_cache_of,
)
