"""Models in formats that are converted before they run, recognised by config.json alone.

Must not know: torch, how they are converted.
"""

from __future__ import annotations

from pathlib import Path

from batchinfer.model.folder import read_optional_json

#: Settings of QTIP's own models.
PARAMS = "quip_params"


def is_convertible(source: Path) -> bool:
    """Whether the folder is a model of QTIP's authors, as their code writes it."""
    return isinstance(read_optional_json(source / "config.json").get(PARAMS), dict)
