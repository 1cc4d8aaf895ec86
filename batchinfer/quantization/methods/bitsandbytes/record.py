"""bitsandbytes: NF4 of any model, and checkpoints that transformers wrote with it."""

from __future__ import annotations

from dataclasses import replace

from batchinfer.quantization.methods.base import (
    ALL_DTYPES,
    DeviceSupport,
    Method,
    Plugin,
    Quantization,
)
from batchinfer.quantization.methods.bitsandbytes.files import (
    BITS_PER_WEIGHT,
    check_stored,
    count_four_bits,
    loaded_bytes,
    scheme_of,
    step_bytes_per_weight,
)

#: vLLM's name for the method that our plugin registers with it.
VLLM_NAME = "batchinfer_bitsandbytes"

_SCHEMES = {"bnb-4bit": "bitsandbytes, 4 bits (NF4, FP4)", "bnb-8bit": "bitsandbytes, 8 bits"}
_CPU = DeviceSupport(
    schemes=tuple(_SCHEMES),
    online=VLLM_NAME,
    checkpoints_as=VLLM_NAME,
    dtypes=ALL_DTYPES,
    packages=("bitsandbytes",),
    refused_experts="bitsandbytes quantizes only linear layers",
)

METHOD = Method(
    name="bitsandbytes",
    schemes=_SCHEMES,
    names=(
        Quantization(
            name="nf4",
            meaning="4-bit NormalFloat of bitsandbytes, and its checkpoints; weight-only",
            bits_per_weight=BITS_PER_WEIGHT,
            schemes=tuple(_SCHEMES),
            takes_plain=True,
            support={
                ("vllm", "cpu"): _CPU,
                ("vllm", "cuda"): replace(_CPU, min_capability=(7, 5)),
            },
            how_to_make="transformers with BitsAndBytesConfig(load_in_4bit=True)",
        ),
    ),
    families=("bitsandbytes",),
    scheme_of=scheme_of,
    weight_parts=("SCB",),
    check_stored=check_stored,
    loaded_bytes=loaded_bytes,
    count_weights=count_four_bits,
    step_bytes_per_weight=step_bytes_per_weight,
    hints={
        "bnb": tuple(_SCHEMES),
        "bitsandbytes": tuple(_SCHEMES),
        "nf4": ("bnb-4bit",),
        "int4": ("bnb-4bit",),
        "4bit": ("bnb-4bit",),
        "fp4": ("bnb-4bit",),
        "int8": ("bnb-8bit",),
        "8bit": ("bnb-8bit",),
    },
    format_hints=("bnb", "bitsandbytes"),
    vllm=Plugin(
        name=VLLM_NAME,
        module="batchinfer.quantization.methods.bitsandbytes.vllm",
        arguments={"load_format": VLLM_NAME},
    ),
)
