"""EXL3 of ExLlamaV3: the trellis codes of `qtip`, in checkpoints as ExLlamaV3 writes them."""

from __future__ import annotations

from batchinfer.quantization.methods.base import (
    ALL_DTYPES,
    DeviceSupport,
    Method,
    Plugin,
    Quantization,
)
from batchinfer.quantization.methods.qtip.files import check_stored, count_weights, loaded_bytes
from batchinfer.quantization.methods.qtip.packed import why_not_packed
from batchinfer.quantization.methods.qtip.record import MODULE, NO_EXPERTS

#: vLLM's name for the method that our plugin registers with it: config.json's `quant_method`.
VLLM_NAME = "exl3"

_DEVICE = DeviceSupport(
    schemes=("exl3",),
    checkpoints_as=VLLM_NAME,
    dtypes=ALL_DTYPES,
    refused_experts=NO_EXPERTS,
)

METHOD = Method(
    name="exl3",
    schemes={"exl3": "EXL3"},
    names=(
        Quantization(
            name="exl3",
            meaning="trellis-coded weights of ExLlamaV3; weight-only",
            bits_per_weight=4.0,
            how_to_make="ExLlamaV3's convert.py",
            schemes=("exl3",),
            support={("vllm", "cpu"): _DEVICE, ("vllm", "cuda"): _DEVICE},
        ),
    ),
    families=("exl3",),
    check_stored=check_stored,
    loaded_bytes=loaded_bytes,
    why_not_packed=why_not_packed,
    count_weights=count_weights,
    hints={word: ("exl3",) for word in ("exl3", "4bit", "8bit")},
    format_hints=("exl3",),
    vllm=Plugin(name=VLLM_NAME, module=MODULE),
)
