"""Unquantized layers that a checkpoint does not have by the name that an engine gives them.

The model's own code may rename them. What nothing was loaded into would be computed with whatever
memory held: it is filled with NaN, and refused if it still has that once all is loaded. Must not
know: vLLM, how layers are coded.
"""

from __future__ import annotations

from typing import Any

import torch

from batchinfer.quantization.methods.qtip.which import neither


class Watched:
    """Before a method of layers with one `weight`, among its bases."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]  # of the other base
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """An output layer that is tied has the embedding's weight by now."""
        weight: Any = layer.weight
        if not weight.is_meta:
            unloaded = weight[:, 0].isnan()
            # Models may leave out the name of their embedding, which is one tensor.
            if bool(unloaded.any() if self.prefix else unloaded.all()):
                raise ValueError(neither(self.prefix or "the embedding", "and the model needs it"))
        super().process_weights_after_loading(layer)  # type: ignore[misc]
