"""GGUF: its checkpoints are recognised, so that a job is refused by name and not by a crash."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Method, Quantization

METHOD = Method(
    name="gguf",
    schemes={"gguf": "GGUF"},
    names=(
        Quantization(
            name="gguf",
            meaning="GGUF files of llama.cpp",
            bits_per_weight=4.8,
            how_to_make="llama.cpp's convert_hf_to_gguf.py and llama-quantize",
            schemes=("gguf",),
        ),
    ),
    families=("gguf",),
    hints={word: ("gguf",) for word in ("gguf", "4bit", "8bit")},
    format_hints=("gguf",),
)
