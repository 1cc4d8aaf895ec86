"""QTIP: weights of 1 to 8 bits as walks through a trellis, in EXL3's tensors."""

from __future__ import annotations

from batchinfer.quantization.methods.base import (
    ALL_DTYPES,
    DeviceSupport,
    Method,
    Plugin,
    Quantization,
    Settings,
    quantize_command,
)
from batchinfer.quantization.methods.qtip.files import (
    FULL_SCHEME,
    RELAXML_SCHEME,
    check_stored,
    count_weights,
    loaded_bytes,
    unknown_format,
)
from batchinfer.quantization.methods.qtip.packed import why_not_packed
from batchinfer.quantization.methods.qtip.recipes import AUTHORS_KEY, RECIPES

#: vLLM's name for the method that our plugin registers with it: config.json's `quant_method`.
VLLM_NAME = "qtip"
MODULE = "batchinfer.quantization.methods.qtip.vllm"
NO_EXPERTS = "trellises code only linear layers"

_RUNNING = {"qtip": "QTIP", FULL_SCHEME: "QTIP with Hadamards of whole sides"}
_SCHEMES = {**_RUNNING, RELAXML_SCHEME: "QTIP as its authors' code stores it"}
_DEVICE = DeviceSupport(
    schemes=tuple(_RUNNING),
    refused={RELAXML_SCHEME: f"{quantize_command('qtip')} converts it"},
    checkpoints_as=VLLM_NAME,
    dtypes=ALL_DTYPES,
    refused_experts=NO_EXPERTS,
)


def _scheme_of(family: str, settings: Settings) -> str:
    if family == AUTHORS_KEY:
        return RELAXML_SCHEME
    if unknown := unknown_format(settings):
        return unknown
    is_full = "full" in (settings.get("had_in"), settings.get("had_out"))
    return FULL_SCHEME if is_full else "qtip"


METHOD = Method(
    name="qtip",
    schemes=_SCHEMES,
    names=(
        Quantization(
            name="qtip",
            meaning="trellis-coded weights of 1 to 8 bits (QTIP); weight-only",
            bits_per_weight=2.0,
            how_to_make=quantize_command("qtip"),
            schemes=tuple(_SCHEMES),
            support={("vllm", "cpu"): _DEVICE, ("vllm", "cuda"): _DEVICE},
        ),
    ),
    families=("qtip", AUTHORS_KEY),
    settings_key=AUTHORS_KEY,
    optional_parts=("tlut", "had_in", "had_out"),
    scheme_of=_scheme_of,
    check_stored=check_stored,
    loaded_bytes=loaded_bytes,
    why_not_packed=why_not_packed,
    count_weights=count_weights,
    recipes=RECIPES,
    hints={word: tuple(_SCHEMES) for word in ("qtip", "4bit", "8bit")},
    format_hints=("qtip",),
    vllm=Plugin(name=VLLM_NAME, module=MODULE),
)
