"""compressed-tensors' settings: groups of layers, each with a scheme of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from batchinfer.quantization.methods.base import MIXED, Settings, Tensor, count_weights

#: What `_group_scheme` finds; other results are words for a scheme that is unknown.
_KNOWN = frozenset(
    ["w8a8", "w8a16", "w4a16", "w4a8", "mxfp8", "nvfp4", "mxfp4"]
    + [f"fp8-{strategy}" for strategy in ("tensor", "channel", "block")]
)


def scheme_of(family: str, settings: Settings) -> str:
    """The scheme of all groups, `MIXED`, or words for one that is unknown."""
    groups = settings["config_groups"].values()
    weight_groups = [group for group in groups if group.get("weights")]  # others: attention
    if not weight_groups:
        return "no config_groups of weights"
    schemes = {_group_scheme(group) for group in weight_groups}
    if unknown := sorted(schemes - _KNOWN):
        return unknown[0]
    return schemes.pop() if len(schemes) == 1 else MIXED


def is_cache_only(family: str, settings: Settings) -> bool:
    """See `Method.is_cache_only`."""
    is_own = family == "compressed-tensors"
    return is_own and bool(settings.get("kv_cache_scheme")) and not settings.get("config_groups")


def kv_cache_of(family: str, settings: Settings) -> str:
    """See `Method.kv_cache_of`."""
    is_own = family == "compressed-tensors"
    return "fp8" if is_own and is_float8(settings.get("kv_cache_scheme")) else "auto"


def is_float8(scheme: object) -> bool:
    """Whether a `kv_cache_scheme` is of 8-bit floats."""
    if not isinstance(scheme, Mapping):
        return False
    return (scheme.get("num_bits"), scheme.get("type")) == (8, "float")


def has_act_order(settings: Settings) -> bool:
    groups = settings["config_groups"].values()
    orders = [group["weights"].get("actorder") for group in groups if group.get("weights")]
    return any(order is True or str(order).lower() in ("group", "dynamic") for order in orders)


def _group_scheme(group: Mapping[str, Any]) -> str:
    weights = group["weights"]
    activations = group.get("input_activations")
    kind, num_bits = weights.get("type", "int"), _number(weights["num_bits"])
    strategy, group_size = weights.get("strategy"), _number(weights.get("group_size"))
    input_type = None
    if activations:
        input_type = (activations.get("type", "int"), _number(activations["num_bits"]))
    if input_type and kind == "int" and not weights.get("symmetric", True):
        kind = "asymmetric int"  # vLLM has no kernel for them beside quantized activations
    match kind, num_bits:
        case "int", 8 | 4 if input_type in (None, ("int", 8)):
            return f"w{num_bits}a{8 if input_type else 16}"
        case "float", 8 if strategy == "group" and group_size == 32:
            return "mxfp8"
        case "float", 8 if strategy in ("tensor", "channel", "block"):
            return f"fp8-{strategy}"
        case "float", 4 if strategy == "tensor_group" and group_size == 16:
            return "nvfp4"
        case "float", 4 if strategy == "group" and group_size == 32:
            return "mxfp4"
    text = f"{num_bits}-bit {kind} weights by {strategy}"
    if input_type:
        text += f" and {input_type[1]}-bit {input_type[0]} activations"
    return text


def _number(value: Any) -> Any:
    """As compressed-tensors reads it, to which "8" is 8."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def count_packed(settings: Settings, module: str, parts: Mapping[str, Tensor]) -> int:
    """See `Method.count_weights`: integers are packed into 32 bits, and rows filled up."""
    weights = count_weights(settings, module, parts)
    packed = parts.get("weight_packed")
    if packed is None or packed.dtype != "I32":
        return weights
    return weights + math.prod(packed.shape) * 32 // _bits_of(settings, module)


def _bits_of(settings: Settings, module: str) -> int:
    """Bits of the group that names the module, else of the first, which names a kind of layers."""
    groups = [group for group in settings["config_groups"].values() if group.get("weights")]
    named = [g for g in groups if any(_is_target(t, module) for t in g.get("targets") or ())]
    return int([*named, *groups][0]["weights"]["num_bits"])


def _is_target(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return module == target or module.endswith(f".{target}")
