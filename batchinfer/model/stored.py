"""Whether weights are stored as the settings of their quantization say, from headers alone.

What to look for is the method's to say. Must not know: tensors' values, which name was asked for.
Of pytorch_model.bin nothing is known, and nothing refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.model.weights import Weights
from batchinfer.quantization import Checkpoint, Stored, method_of


def check_stored(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any] | None,
    weights: Weights,
    folder: Path,
    text: Mapping[str, Any] | None = None,
) -> None:
    """Refuse weights that are not what the settings say. Raises ConfigError.

    `text`: settings of the model, if it is a language model and no more.
    """
    method = method_of(checkpoint.scheme)
    if method is None or not weights.tensors:
        return
    stored = Stored(
        scheme=checkpoint.scheme,
        words=checkpoint.words,
        settings=settings or {},
        tensors=weights.tensors,
        dtypes=weights.dtypes,
        folder=str(folder),
        text=text or {},
    )
    method.check_stored(stored)
