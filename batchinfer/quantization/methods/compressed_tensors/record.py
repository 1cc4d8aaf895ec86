"""compressed-tensors: 8- and 4-bit integers, and the container of FP8 and FP4 checkpoints."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Device, Method, Quantization
from batchinfer.quantization.methods.compressed_tensors.files import has_act_order, scheme_of
from batchinfer.quantization.methods.compressed_tensors.recipes import RECIPES
from batchinfer.quantization.methods.support import (
    COMPRESSED,
    EXPERT_FLAGS,
    INT4_KERNEL,
    NO_ACT_ORDER,
    quantize_command,
)

_INT4 = ("w4a16", "w4a8")
_INT8 = ("w8a8", "w8a16")

_INT8_NAME = Quantization(
    name="int8",
    meaning="8-bit integer weights and, in W8A8, activations (compressed-tensors)",
    bits_per_weight=8.0,
    cpu=Device(
        schemes=("w8a8",),
        refused={"w8a16": "vLLM's CPU kernels for 16-bit activations take 4-bit weights"},
        dtypes=("bfloat16", "float32"),
        refused_dtypes={"float16": "aborts the process in vLLM"},
        made_by="int8",
        packages=COMPRESSED,
        kernels={"w8a8": "onednn_scaled_mm", "plain": "onednn_scaled_mm"},
        refused_adapters="vLLM's CPU kernel takes the weights to where adapters do not find them",
        expert_cpu_flags=EXPERT_FLAGS,
    ),
    gpu=Device(
        schemes=("w8a8", "w8a16"),
        made_by="int8",
        min_capability=(7, 5),
        packages=COMPRESSED,
    ),
    how_to_make=quantize_command("int8"),
)

_INT4_NAME = Quantization(
    name="int4",
    meaning="4-bit integer weights in groups, 16-bit activations (compressed-tensors)",
    bits_per_weight=4.125,
    cpu=Device(
        schemes=("w4a16", "w4a8"),
        made_by="int4",
        packages=COMPRESSED,
        kernels={"w4a16": INT4_KERNEL, "plain": INT4_KERNEL},  # w4a8 has one of torch
        refused_act_order=NO_ACT_ORDER,
        expert_cpu_flags=EXPERT_FLAGS,
    ),
    gpu=Device(
        schemes=("w4a16",),
        made_by="int4",
        refused={"w4a8": "vLLM does not find its packed weights"},
        min_capability=(7, 5),
        packages=COMPRESSED,
    ),
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
    has_act_order=has_act_order,
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
