"""Models in formats that are converted before they run, recognised by config.json alone.

Must not know: torch, how they are converted.
"""

from __future__ import annotations

from pathlib import Path

from batchinfer.model.folder import read_optional_json
from batchinfer.quantization import Recipe


def is_convertible(source: Path, recipe: Recipe) -> bool:
    """Whether the folder is a model as the authors of the recipe's method write it."""
    key = recipe.converts
    return key is not None and isinstance(read_optional_json(source / "config.json").get(key), dict)
