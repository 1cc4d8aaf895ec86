"""compressed-tensors: 8- and 4-bit integers, and the container of FP8 and FP4 checkpoints."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Method, Quantization, quantize_command
from batchinfer.quantization.methods.compressed_tensors.files import (
    count_packed,
    has_act_order,
    is_cache_only,
    kv_cache_of,
    scheme_of,
)
from batchinfer.quantization.methods.compressed_tensors.recipes import RECIPES

_INT4 = ("w4a16", "w4a8")
_INT8 = ("w8a8", "w8a16")

_INT8_NAME = Quantization(
    name="int8",
    meaning="8-bit integer weights and, in W8A8, activations (compressed-tensors)",
    bits_per_weight=8.0,
    schemes=("w8a8", "w8a16"),
    takes_plain=True,
    how_to_make=quantize_command("int8"),
)

_INT4_NAME = Quantization(
    name="int4",
    meaning="4-bit integer weights in groups, 16-bit activations (compressed-tensors)",
    bits_per_weight=4.125,
    schemes=("w4a16", "w4a8"),
    takes_plain=True,
    how_to_make=f"{quantize_command('int4')}, or awq or gptq with calibration",
)

METHOD = Method(
    name="compressed-tensors",
    schemes={
        "w8a8": "W8A8 (int8)",
        "w8a16": "W8A16 (int8 weights)",
        "w4a16": "W4A16 (int4 weights)",
        "w4a8": "W4A8 (int4 weights, int8 activations)",
    },
    names=(_INT8_NAME, _INT4_NAME),
    families=("compressed-tensors",),
    scheme_of=scheme_of,
    optional_parts=("weight_zero_point",),
    is_cache_only=is_cache_only,
    kv_cache_of=kv_cache_of,
    has_act_order=has_act_order,
    count_weights=count_packed,
    hints={
        "awq": (*_INT4, *_INT8),
        "gptq": (*_INT4, *_INT8),
        "int4": _INT4,
        "int8": _INT8,
        "4bit": _INT4,
        "8bit": _INT8,
        "w4a16": ("w4a16",),
        "w4a8": ("w4a8",),
        "w8a8": ("w8a8",),
        "w8a16": ("w8a16",),
    },
    recipes=RECIPES,
)
