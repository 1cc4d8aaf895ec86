"""Tensors that a checkpoint lacks, found by names and dtypes: engines compute without them.

vLLM looks for weights that were not loaded in unquantized models only; elsewhere it computes with
what its memory happened to hold. How a model is built is not known here, so a tensor is missing
only if the model's other layers say so, and what differs is taken for meant as soon as a second
layer differs likewise, config.json lists the layer as another kind, or the layer also has something
that the others lack. In the language model's list of layers:

- layers are numbered 0 to n - 1, and no fewer than config.json says, if no other list could be
  meant; so are the experts of a layer, and one layer alone does not have fewer than all others;
- one layer or expert alone does not lack modules of those that are otherwise like it: an MLP, one
  of q, k and v, an output projection;
- one layer alone does not lack a part of a quantized weight that modules with the same other parts
  in the same dtypes have: a scale without its weight, a weight without its scale.

Not seen: what several layers lack in the same way; what the only layer of its kind lacks, such as
the dense one before layers of experts, and anything in models of fewer than three layers; norms,
biases, zero points, scales of activations and of the KV cache; embeddings, head, towers for images
and sound, layers for drafts; pytorch_model.bin. Must not know: values of weights, engines.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.weights import Weights
from batchinfer.quantization import METHODS, Tensor

_IN_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|blocks))\.(\d+)\.(.+)")
_IN_EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\bexperts\.\d+")
#: In names of what sees and hears for a language model, or drafts for it.
_TOWER = re.compile(r"vis|image|audio|speech|mtp")
#: Layers may differ in these: some weights are symmetric, some codes have tables.
_OPTIONAL = re.compile("|".join(["bias", *(p for m in METHODS for p in m.optional_parts)]))
#: Tensors that are a weight, or with others a quantized one: the last part of their names.
_OF_WEIGHT = re.compile("|".join(["weight.*", *(p for m in METHODS for p in m.weight_parts)]))
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
#: Two that are alike are a pattern; with one nobody can say which of both is damaged.
_NUM_PEERS = 2
_NUM_NAMED = 3

Tensors = Mapping[str, Tensor]
Lists = dict[str, dict[int, dict[str, Tensor]]]  # by name of list, layer, rest of the name


def check_complete(weights: Weights, text: Mapping[str, Any], folder: Path) -> None:
    """Raise ConfigError if tensors are missing. `text`: settings of the language model."""
    lists = _lists(weights.tensors)
    if not lists:
        return
    path, layers = _largest(lists)
    if lost_layers := _lost_layers(layers, text, is_only=len(lists) == 1):
        names = [f"{path}.{number}" for number in lost_layers]
        raise _incomplete(folder, names, f"there are {len(layers)} others")
    kinds = _kinds(layers, text)
    lost = [*_lost_experts(layers, kinds), *_lost_modules(layers, kinds), *_lost_parts(layers)]
    if lost:
        names = [f"{path}.{name}" for name in dict.fromkeys(lost)]
        number, _, _ = lost[0].partition(".")
        own = f"{path}.{number}.{next(iter(layers[int(number)]))}"
        why = f"other layers have them; {weights.file_names[own]} holds what is there of this one"
        raise _incomplete(folder, names, why)


def _lists(tensors: Tensors) -> Lists:
    lists: Lists = {}
    for name, tensor in tensors.items():
        match = _IN_LAYER.fullmatch(name)
        if match and not _TOWER.search(match[1]):
            lists.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    return lists


def _largest(lists: Lists) -> tuple[str, dict[int, dict[str, Tensor]]]:
    """Beside a language model's list there may be small ones, of projectors or codecs."""

    def num_bytes(path: str) -> int:
        return sum(t.num_bytes for layer in lists[path].values() for t in layer.values())

    path = max(lists, key=num_bytes)
    return path, lists[path]


def _incomplete(folder: Path, names: list[str], why: str) -> ConfigError:
    shown = ", ".join(names[:_NUM_NAMED])
    more = f" and {len(names) - _NUM_NAMED:,} more" if len(names) > _NUM_NAMED else ""
    return ConfigError(
        f"{folder} is incomplete: its weights lack {shown}{more} ({why}). Copy the model again"
    )


def _lost_layers(
    layers: Mapping[int, Tensors], text: Mapping[str, Any], *, is_only: bool
) -> list[int]:
    if "block_configs" in text:  # such models have layers that do nothing, without a tensor
        return []
    num_expected = max(layers) + 1
    if is_only:  # of several, config.json may mean another, or count a layer at each use
        num_expected = max(num_expected, _num_layers(text))
    return [number for number in range(num_expected) if number not in layers]


def _num_layers(text: Mapping[str, Any]) -> int:
    """The least of what config.json and its class's defaults call so."""
    return min((text[key] for key in _COUNTS if isinstance(text.get(key), int)), default=0)


def _kinds(layers: Iterable[int], text: Mapping[str, Any]) -> dict[int, Hashable]:
    """What config.json says of each layer, in all lists that are as long as the model."""
    num_layers = _num_layers(text)
    told = [
        value
        for key, value in text.items()
        if isinstance(value, list) or (isinstance(value, str) and "pattern" in key)
        if len(value) == num_layers
    ]
    return {n: tuple(repr(v[n]) for v in told) if n < num_layers else "draft" for n in layers}


def _lost_experts(layers: Mapping[int, Tensors], kinds: Mapping[int, Hashable]) -> Iterator[str]:
    """Missing experts, and tensors of modules that one expert alone lacks."""
    lists: dict[str, dict[int, dict[int, dict[str, Tensor]]]] = {}  # by name, layer and expert
    for number, layer in layers.items():
        for rest, tensor in layer.items():
            if match := _in_expert(rest):
                name, expert, own_rest = match
                experts = lists.setdefault(name, {}).setdefault(number, {})
                experts.setdefault(expert, {})[own_rest] = tensor
    for name, by_layer in lists.items():
        sizes = {number: max(experts) + 1 for number, experts in by_layer.items()}
        for number, experts in by_layer.items():
            others = {sizes[n] for n in sizes if n != number}
            num_peers = sum(kinds[n] == kinds[number] for n in sizes if n != number)
            size = sizes[number]
            if len(others) == 1 and num_peers >= _NUM_PEERS:
                size = max(size, *others)
            yield from (f"{number}.{name}.{e}" for e in range(size) if e not in experts)
            lost = _lost_modules(experts, dict.fromkeys(experts, ()))
            yield from (f"{number}.{name}.{rest}" for rest in lost)


def _lost_modules(members: Mapping[int, Tensors], kinds: Mapping[int, Hashable]) -> Iterator[str]:
    """Tensors of modules that one layer or expert alone lacks, with its number before them."""
    alike: dict[frozenset[str], list[int]] = {}
    for number, tensors in members.items():
        modules = set()
        for rest, tensor in tensors.items():
            module, part, is_weight = _split(rest)
            if is_weight or (len(tensor.shape) >= 2 and not _OPTIONAL.fullmatch(part)):
                modules.add(module)
        alike.setdefault(frozenset(modules), []).append(number)
    for own, (number, *more) in alike.items():
        for other, numbers in alike.items():
            peers = [n for n in numbers if kinds[n] == kinds[number]]
            if more or len(peers) < _NUM_PEERS or not own < other:
                continue
            peer = members[peers[0]]
            lost = [rest for rest in peer if _split(rest)[0] in other - own]
            if any(len(peer[rest].shape) >= 2 for rest in lost):  # more than norms
                yield from (f"{number}.{rest}" for rest in lost)
                break


def _lost_parts(layers: Mapping[int, Tensors]) -> Iterator[str]:
    """Tensors of quantized weights that one layer alone lacks, with its number before them."""
    places: dict[str, dict[tuple[int, str], dict[str, str]]] = {}  # layer, module; part -> dtype
    for number, layer in layers.items():
        for rest, tensor in layer.items():
            place, part, is_weight = _split(rest)
            if is_weight:
                module = number, rest[: -len(part)]
                places.setdefault(place, {}).setdefault(module, {})[part] = tensor.dtype
    for modules_there in places.values():
        alike: dict[frozenset[tuple[str, str]], list[tuple[int, str]]] = {}
        for module, parts in modules_there.items():
            alike.setdefault(frozenset(parts.items()), []).append(module)
        for own, modules in alike.items():
            if len({number for number, _ in modules}) > 1:
                continue
            for other, peers in alike.items():
                is_quantized = any(dtype not in _FLOATS for _, dtype in other)
                if own < other and is_quantized and len(peers) >= _NUM_PEERS:
                    lost = sorted(part for part, _ in other - own)
                    yield from (f"{n}.{stem}{part}" for n, stem in modules for part in lost)
                    break


@cache  # of names within a layer, which are the same in all of them
def _in_expert(rest: str) -> tuple[str, int, str] | None:
    """(name of the list, number of the expert, rest of the name)"""
    match = _IN_EXPERT.fullmatch(rest)
    return (match[1], int(match[2]), match[3]) if match else None


@cache
def _split(rest: str) -> tuple[str, str, bool]:
    """Module, the same for all experts; part of it; whether that is a weight or part of one."""
    module, separator, part = rest.partition(".weight.")  # some methods write parts so
    part = f"weight.{part}"
    if not separator:
        module, _, part = rest.rpartition(".")
    is_weight = bool(_OF_WEIGHT.fullmatch(part)) and not _OPTIONAL.fullmatch(part)
    # What is not part of a weight stands for itself: all experts in one tensor, for example.
    return _EXPERT.sub("experts.*", module if is_weight else rest), part, is_weight
