"""QTIP: its checkpoints are recognised, so that a job is refused by name and not by a crash."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Method, Quantization

METHOD = Method(
    name="qtip",
    schemes={"qtip": "QTIP"},
    names=(
        Quantization(
            name="qtip",
            meaning="trellis-coded weights of 2 to 4 bits (QTIP)",
            bits_per_weight=2.0,
            how_to_make="QTIP's own tools",
            schemes=("qtip",),
        ),
    ),
    families=("qtip",),
    hints={word: ("qtip",) for word in ("qtip", "4bit", "8bit")},
    format_hints=("qtip",),
)
