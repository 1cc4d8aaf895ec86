"""What weights, activations and the KV cache may be stored in, by name, and others' words for it.

Must not know: what a name means, which of them run where.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema

from batchinfer.config.values import shown
from batchinfer.quantization import meant_by

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
#: What each means and needs: batchinfer/quantization/methods/. A test holds the two together.
QuantizationName = Literal[
    "none",
    "fp32",
    "fp16",
    "bf16",
    "int8",
    "int4",
    "fp8",
    "fp4",
    "awq",
    "gptq",
    "nf4",
    "qtip",
    "exl3",
    "gguf",
]


def _known_name(name: object, *, may_be_auto: bool = True) -> object:
    """Refuse another program's word with the name that means it. What is unknown is left as is."""
    is_word = isinstance(name, str) and name not in get_args(QuantizationName)
    meant = meant_by(str(name)) if is_word else None
    if meant is None or (meant == "auto" and not may_be_auto):
        return name
    what = "which takes the format of the checkpoint" if meant == "auto" else "the name for it here"
    raise ValueError(f"write {meant}, {what}, got {shown(name)}")


Quantization = Annotated[Literal["auto", QuantizationName], BeforeValidator(_known_name)]
Fallback = Annotated[QuantizationName, BeforeValidator(partial(_known_name, may_be_auto=False))]
#: What each means and needs: batchinfer/quantization/kv_cache.py.
KvCacheDtype = Literal[
    "auto",
    "fp8",
    "fp8_e5m2",
    "fp8_per_token_head",
    "int8_per_token_head",
    "int4_per_token_head",
]

_DTYPE_NAMES: dict[object, Dtype] = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
}
AnyDtype = Annotated[
    Dtype,
    BeforeValidator(lambda name: _DTYPE_NAMES.get(name, name) if isinstance(name, str) else name),
    WithJsonSchema({"enum": ["auto", "float32", "float16", "bfloat16", *_DTYPE_NAMES]}),
]
AnyKvCacheDtype = Annotated[
    KvCacheDtype,
    BeforeValidator(lambda name: "fp8" if name == "fp8_e4m3" else name),
    WithJsonSchema({"enum": [*get_args(KvCacheDtype), "fp8_e4m3"]}),
]
