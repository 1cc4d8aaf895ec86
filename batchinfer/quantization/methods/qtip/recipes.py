"""How trellis-coded checkpoints are made here."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Recipe

RECIPES = (
    Recipe(
        "qtip",
        "weights of 1 to 8 bits as walks through a trellis",
        "QTIP",
        "qtip",
        write="batchinfer.making.trellis.make",
        modifier="BlockLDLQ",
        codes=("mcg", "mul1", "3inst", "1mad", "hyb"),
    ),
)
