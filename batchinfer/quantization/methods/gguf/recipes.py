"""How GGUF files are made here."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Option, Recipe

RECIPES = (
    Recipe(
        "gguf",
        "one GGUF file, for llama.cpp",
        "GGUF",
        "gguf",
        make="batchinfer.making.gguf.make",
        file_name="model.gguf",
        options=(Option("type", "what weights are stored as", ("q8_0", "f32", "f16", "bf16")),),
    ),
)
