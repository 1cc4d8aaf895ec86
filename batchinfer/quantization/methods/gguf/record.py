"""GGUF: files of llama.cpp, whose weights are in one of many types, several in one file."""

from __future__ import annotations

from batchinfer.quantization.methods.base import (
    Method,
    Quantization,
    Stored,
    quantize_command,
)
from batchinfer.quantization.methods.gguf.files import TYPES
from batchinfer.quantization.methods.gguf.recipes import RECIPES


def _as_read(stored: Stored) -> None:
    """Every type is one that the reader knows, or the file was refused by then."""


#: What a computation goes through; no file stores weights so.
_OF_STEPS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")

METHOD = Method(
    name="gguf",
    schemes={"gguf": "GGUF"},
    names=(
        Quantization(
            name="gguf",
            meaning="GGUF files of llama.cpp, in the types that they are stored in",
            bits_per_weight=4.8,
            how_to_make=f"{quantize_command('gguf')}, or llama.cpp's llama-quantize",
            schemes=("gguf",),
            types=tuple(name for name, _, _ in TYPES.values() if name not in _OF_STEPS),
        ),
    ),
    families=("gguf",),
    check_stored=_as_read,
    hints={word: ("gguf",) for word in ("gguf", "4bit", "8bit")},
    format_hints=("gguf",),
    recipes=RECIPES,
)
