"""The checkpoints that are made here: one record for each `batchinfer quantize --method`."""

from __future__ import annotations

from functools import partial

from batchinfer.quantization.methods.base import Recipe

_WRITE = "batchinfer.quantization.methods.compressed_tensors.write"

_recipe = partial(Recipe, write=_WRITE)

RECIPES = (
    _recipe("int8", "8-bit integer weights and activations (W8A8)", "W8A8", "int8"),
    _recipe("int4", "4-bit integer weights in groups of 128 (W4A16)", "W4A16", "int4"),
    _recipe(
        "fp8",
        "8-bit float weights and activations: a scale for each channel, or on a machine with "
        "vLLM's CPU build for each block of 128 x 128",
        "FP8_DYNAMIC",
        "fp8",
        cpu_preset="FP8_BLOCK",
    ),
    _recipe(
        "nvfp4", "4-bit float weights in groups of 16, weights only (NVFP4A16)", "NVFP4A16", "fp4"
    ),
    _recipe(
        "mxfp4", "4-bit float weights in groups of 32, weights only (MXFP4A16)", "MXFP4A16", "fp4"
    ),
    Recipe(
        "awq",
        "int4, its weights scaled by activations first",
        "W4A16",
        "int4",
        modifier="AWQModifier",
        modifiers=(
            "llmcompressor.modifiers.transform.awq:AWQModifier",
            "llmcompressor.modifiers.quantization:QuantizationModifier",
        ),
        texts="needed",
    ),
    Recipe(
        "gptq",
        "int4, each weight's error spread on later ones",
        "W4A16",
        "int4",
        modifier="GPTQModifier",
        modifiers=("llmcompressor.modifiers.gptq:GPTQModifier",),
        texts="needed",
    ),
)
