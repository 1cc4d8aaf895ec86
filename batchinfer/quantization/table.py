"""The names of `model.quantization` and the schemes of checkpoints, as the methods give them.

Must not know: how a checkpoint is recognised, which machine this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from batchinfer.quantization.methods import METHODS, Method, Recipe
from batchinfer.quantization.methods.base import Quantization

#: What the files of a checkpoint can be -> how it is called.
SCHEMES: Mapping[str, str] = MappingProxyType(
    {scheme: words for method in METHODS for scheme, words in method.schemes.items()}
)

TABLE: tuple[Quantization, ...] = tuple(name for method in METHODS for name in method.names)

#: How an unquantized model becomes a quantized checkpoint, by `batchinfer quantize --method`.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.method: recipe for method in METHODS for recipe in method.recipes}
)


def record_of(name: str) -> Quantization:
    """The record of a name that the job's model allows."""
    return next(record for record in TABLE if record.name == name)


def method_by_name(name: str) -> Method | None:
    """The method that brings a name of `model.quantization`; None for a family without one."""
    return next((m for m in METHODS if any(record.name == name for record in m.names)), None)


def name_of(scheme: str) -> str:
    """The name that `auto` takes for a checkpoint of this scheme."""
    return next(record.name for record in TABLE if scheme in record.schemes)
