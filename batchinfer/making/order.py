"""A checkpoint that is asked for, as those who make one are given it.

Must not know: torch, how anything is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.model import ModelFacts
from batchinfer.quantization import Recipe


@dataclass(frozen=True, slots=True)
class MakingOrder:
    model: ModelFacts  # unquantized
    target: Path  # an empty folder
    recipe: Recipe
    options: Mapping[str, str]  # each of the recipe's that has a value
    texts: Sequence[str]  # to calibrate with, if any
    finished: Path  # a folder of the maker's own: what a killed process left there is resumed
    device: str | None  # as in `Machine`


@dataclass(frozen=True, slots=True)
class Reporter:
    """Where progress is reported to."""

    say: Callable[[str], None]  # what is done now
    move: Callable[[float], None]  # its share that is done, 0 to 1
    note: Callable[[str], None]  # a line to be kept


@dataclass(frozen=True, slots=True)
class LayerCounts:
    num_quantized: int  # linear layers
    num_linear: int
