"""Tensors whose shapes contradict config.json: what vLLM would find while it loads, or never.

Only what is certain. Sizes are compared under the names that most models have, where config.json is
of a language model alone and has one number for each; all others are left to vLLM. Must not know:
engines, machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization import Tensor

_FLOATS = ("F32", "F16", "BF16")


def check_shapes(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Raise ConfigError if tensors cannot be of a model with these settings."""
    # Of a packed weight, whatever it is stored as, there are pieces: `module.weight.absmax`.
    packed = {module + ".weight" for module, dot, _ in map(_divided, tensors) if dot}
    for name, shape, keys in _expected(config):
        found = tensors.get(name)
        if found is None or name in packed or found.dtype not in _FLOATS:
            continue
        if found.shape != shape:
            raise ConfigError(
                f"{folder}: {name} is {list(found.shape)}, but config.json says {list(shape)} "
                f"({keys}): they are not of one model, copy it again"
            )


def _divided(name: str) -> tuple[str, str, str]:
    return name.partition(".weight.")


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(tensor, its shape, the keys that say so)"""
    hidden, vocabulary, width = (
        config.get(key) for key in ("hidden_size", "vocab_size", "intermediate_size")
    )
    if any(isinstance(value, dict) and "hidden_size" in value for value in config.values()):
        return  # of several models
    if not isinstance(hidden, int):
        return
    yield "model.layers.0.input_layernorm.weight", (hidden,), "hidden_size"
    if isinstance(vocabulary, int):
        shape = (vocabulary, hidden)
        yield "model.embed_tokens.weight", shape, "vocab_size, hidden_size"
    if isinstance(width, int):
        shape = (hidden, width)
        yield "model.layers.0.mlp.down_proj.weight", shape, "hidden_size, intermediate_size"
