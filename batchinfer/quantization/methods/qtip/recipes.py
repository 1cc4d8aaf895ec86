"""How trellis-coded checkpoints are made here."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Option, Recipe

#: In config.json of models as QTIP's authors write them.
AUTHORS_KEY = "quip_params"

RECIPES = (
    Recipe(
        "qtip",
        "weights of 1 to 8 bits as walks through a trellis",
        "QTIP",
        "qtip",
        make="batchinfer.making.trellis.recipe",
        modifier="BlockLDLQ",
        texts="optional",
        is_continued=True,
        options=(
            Option("bits", "of a weight, usually 2, 3 or 4", range(1, 9), is_needed=True),
            Option("code", "what weights are computed by", ("mcg", "mul1", "3inst", "1mad", "hyb")),
        ),
        converts=AUTHORS_KEY,
        convert="batchinfer.making.converted",
    ),
)
