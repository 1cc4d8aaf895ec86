"""Which of a model's layers a checkpoint has coded, and which it does not have at all.

Its headers say it, where there are any: `coded` and `plain` are modules with a trellis and with a
weight. Must not know: vLLM, tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

HEAD = "lm_head"
#: Layers of one block that engines compute as one, on the same inputs.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Whose inputs, and whose outputs, are as many as the model's hidden size.
_FROM_HIDDEN = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)")
_TO_HIDDEN = re.compile(r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)")
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


def lost_layers(
    coded: Collection[str], plain: Collection[str], *, is_tied: bool
) -> Iterator[tuple[str, str]]:
    """Layers that a checkpoint certainly lacks, and what shows it, by names alone.

    `plain`: modules with a matrix. An engine knows the model's own names, and finds more.
    """
    blocks = _children({*coded, *plain})
    for above in dict.fromkeys(module.rpartition(".")[0] for module in sorted(coded)):
        if not _NUMBER.search(f"{above}."):
            continue
        for lost in _lost_beside({n for n in blocks[above] if "norm" not in n}):
            yield f"{above}.{lost}", f"and {above}.{min(blocks[above])} has one"
    outside = [module for module in (*coded, *plain) if not _NUMBER.search(f"{module}.")]
    if len(outside) < 2 and len(outside) < len({*coded, *plain}) and not is_tied:
        yield HEAD, "the output layer, which does not share the embedding's weight"


def _lost_beside(names: set[str]) -> Iterator[str]:
    """Of an attention or MLP that has layers of these names."""
    queries, (gate, up) = set(_TOGETHER[0]), _TOGETHER[1]
    if "k_proj" in names and not any(name.startswith("q") for name in names):
        yield "q_proj"
    if queries <= names and not names - queries:
        yield "o_proj"
    if names & {up, "gate_up_proj"} and "down_proj" not in names:
        yield "down_proj"
    if "down_proj" in names and not names - {"down_proj", gate}:
        yield up


def mixed_layers(coded: Collection[str], plain: Collection[str]) -> Iterator[tuple[str, str]]:
    """Layers that are computed as one with others, and are not stored as those are; and why not."""
    for above, names in _children(coded).items():
        for together in _TOGETHER:
            others = [n for n in together if f"{above}.{n}" in plain and n not in names]
            if others and (own := [name for name in together if name in names]):
                why = f"it is not coded and {own[0]} beside it is, and vLLM computes both as one"
                yield f"{above}.{others[0]}", why


def wrong_sizes(
    sizes: Mapping[str, tuple[int, int]], hidden_size: int
) -> Iterator[tuple[str, str]]:
    """Coded layers that do not fit the model or those beside them, and why not.

    `sizes`: of each (in, out). `hidden_size`: with padding; 0 if it is not known.
    """
    for module, (num_in, num_out) in sizes.items():
        for pattern, num, side in ((_FROM_HIDDEN, num_in, "in"), (_TO_HIDDEN, num_out, "out")):
            if hidden_size and num != hidden_size and pattern.fullmatch(module):
                why = f"hidden_size of config.json needs {hidden_size}"
                yield module, f"its trellis has {num} {side}puts, and {why}"
    for above, names in _children(sizes).items():
        for together in _TOGETHER:
            first, *others = [n for n in together if n in names] or [""]
            for other in others:
                nums = [sizes[f"{above}.{name}"][0] for name in (first, other)]
                if nums[0] != nums[1]:
                    why = f"its trellis has {nums[1]} inputs, and that of {first} beside it"
                    yield f"{above}.{other}", f"{why} {nums[0]}"
        if {"up_proj", "down_proj"} <= names:
            num_up, num_down = sizes[f"{above}.up_proj"][1], sizes[f"{above}.down_proj"][0]
            if num_up != num_down:
                why = f"its trellis has {num_down} inputs, and up_proj beside it {num_up} outputs"
                yield f"{above}.down_proj", why


def _children(modules: Collection[str]) -> dict[str, set[str]]:
    """The first parts of their names -> the last parts."""
    found: dict[str, set[str]] = {}
    for module in modules:
        above, _, last = module.rpartition(".")
        found.setdefault(above, set()).add(last)
    return found
