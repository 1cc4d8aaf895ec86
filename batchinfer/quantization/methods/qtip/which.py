"""Which of a model's layers a checkpoint has coded, and which it does not have at all.

Its headers say it, where there are any: `coded` and `plain` are modules with a trellis and with a
weight. Must not know: vLLM, tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

HEAD = "lm_head"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_coded(
    name: str, settings: Mapping[str, Any], coded: Collection[str] | None, plain: Collection[str]
) -> bool:
    """Of a linear layer of the model. `coded` is None without headers: then settings say it.

    Raises ValueError for one that the checkpoint certainly lacks.
    """
    said = settings.get("modules", {}).get(name)
    is_said = said is not None and not said.get("unquantized")
    if coded is None:
        if said is not None:
            return is_said
        return name.rpartition(".")[2] != HEAD or has_coded_head(settings)
    if is_said and name not in coded:
        raise ValueError(
            f"config.json says that {name} is coded, and the checkpoint has no trellis of it: copy "
            "it again"
        )
    if said is None and (why := _why_lost(name, coded, plain)):
        raise ValueError(neither(name, why))
    return name in coded


def has_coded_head(settings: Mapping[str, Any]) -> bool:
    """As settings say; EXL3 codes the output layer of every model."""
    if settings.get("quant_method") == "exl3":
        return True
    said = settings.get("modules", {}).get(HEAD)
    return said is not None and not said.get("unquantized")


def has_alike(name: str, modules: Collection[str]) -> bool:
    """Whether one has the same last name: the model's own code may give it the whole one."""
    last = name.rpartition(".")[2]
    return any(other.rpartition(".")[2] == last for other in modules)


def _why_lost(module: str, coded: Collection[str], plain: Collection[str]) -> str:
    """What shows that a linear layer of the model is not in its checkpoint; "" if nothing does.

    An engine would compute with whatever its memory holds. `plain`: modules with a weight.
    """
    if module in coded or module in plain:
        return ""
    if _NUMBER.sub("*", module) in {_NUMBER.sub("*", other) for other in coded}:
        return "which other blocks of the model have coded"
    above, dot, _ = module.rpartition(".")
    beside = sorted(other for other in coded if dot and other.rpartition(".")[0] == above)
    return f"and {beside[0]} beside it is coded" if beside else ""


def neither(module: str, why: str) -> str:
    """For people: what is to be done about a layer that a checkpoint does not have."""
    return (
        f"the checkpoint has neither a trellis nor a weight of {module}, {why}: copy it again, or "
        "quantize the model again"
    )
