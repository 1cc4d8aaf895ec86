"""Facts of model folders, by the keys that a job's `model` may have."""

from __future__ import annotations

from typing import Any

from batchinfer import model
from batchinfer.config import ModelSettings
from batchinfer.model import ModelFacts
from batchinfer.quantization import Begun, Machine


def read_model(
    path: str,
    *,
    machine: Machine = Machine(None, engine="vllm"),  # noqa: B008 - a constant
    needs_weights: bool = True,
    begun: Begun | None = None,
    **settings: Any,
) -> ModelFacts:
    """As `batchinfer.model.read_model`, of the folder at `path`."""
    return model.read_model(
        ModelSettings(path=path, **settings),
        machine=machine,
        needs_weights=needs_weights,
        begun=begun,
    )
