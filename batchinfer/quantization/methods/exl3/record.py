"""EXL3: its checkpoints are recognised, so that a job is refused by name and not by a crash."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Method, Quantization

METHOD = Method(
    name="exl3",
    schemes={"exl3": "EXL3"},
    names=(
        Quantization(
            name="exl3",
            meaning="trellis-coded weights of ExLlamaV3",
            bits_per_weight=4.0,
            how_to_make="ExLlamaV3's convert.py",
            schemes=("exl3",),
        ),
    ),
    families=("exl3",),
    hints={word: ("exl3",) for word in ("exl3", "4bit", "8bit")},
    format_hints=("exl3",),
)
