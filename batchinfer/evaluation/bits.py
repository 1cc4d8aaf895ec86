"""Bits for each weight of a checkpoint, tensor by tensor from its headers.

All that a module stores counts: packed weights, scales, zero points, codebooks, biases. Decoder
layers (norms included) and the output layer are counted apart; embeddings, the last norm and other
towers are in neither. Of a model whose output layer is its embedding, that is counted as the head.
How many weights a packed tensor holds is its method's to say (`Method.count_weights`). Must not
know: engines, what runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby

from batchinfer.config import ModelSettings
from batchinfer.evaluation.outputs import Output
from batchinfer.model import ModelFacts
from batchinfer.model.contents import ModelFolder, read_folder
from batchinfer.model.shape import DTYPE_BYTES
from batchinfer.quantization import METHODS, Machine, Tensor, method_of, support_of
from batchinfer.quantization.methods.base import Settings, count_weights

LAYER, HEAD, OTHER = "layer", "head", "other"

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
_TOWER = re.compile(r"(?:^|\.)(?:vision\w*|visual|audio\w*|multi_modal\w*|mtp)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)$")
_Count = Callable[[Settings, str, Mapping[str, Tensor]], int]
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Module:
    """What one module of the model stores."""

    name: str
    kind: str  # LAYER | HEAD | OTHER
    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.num_bytes / self.num_weights if self.num_weights else None


@dataclass(frozen=True, slots=True)
class Bits:
    """A checkpoint's modules, in the order of their names. None of a file that is not safetensors:
    nothing is known of it.
    """

    modules: Sequence[Module]

    def per_weight(self, kind: str) -> float | None:
        """Mean over the modules of a kind; None without any."""
        num_weights = self.num_weights(kind)
        num_bytes = sum(module.num_bytes for module in self.modules if module.kind == kind)
        return 8 * num_bytes / num_weights if num_weights else None

    def num_weights(self, kind: str) -> int:
        return sum(module.num_weights for module in self.modules if module.kind == kind)

    @property
    def num_bytes(self) -> int:
        return sum(module.num_bytes for module in self.modules)


def read_bits(path: str, revision: str | None = None) -> Bits:
    """The bits of a model folder or hub name. Raises ConfigError."""
    settings = ModelSettings.model_construct(path=path, revision=revision)
    return bits_of(read_folder(settings))


def bits_of(folder: ModelFolder) -> Bits:
    settings = folder.quantization_settings or {}
    count = _counter(settings, folder.checkpoint.scheme)
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in folder.weights.tensors.items():
        module, part = module_of(name)
        by_module.setdefault(module, {})[part] = tensor
    # Some files of tied models hold a second copy, which nothing reads; a coded one is read.
    has_head = any(
        _HEAD.search(name) and (not folder.shape.is_tied or not parts.keys() <= {"weight", "bias"})
        for name, parts in by_module.items()
    )
    return Bits(
        [
            Module(
                name=name,
                kind=_kind(name, has_head=has_head),
                num_weights=count(settings, name, parts),
                num_bytes=sum(tensor.num_bytes for tensor in parts.values()),
            )
            for name, parts in sorted(by_module.items(), key=lambda item: _in_order(item[0]))
        ]
    )


def module_of(name: str) -> tuple[str, str]:
    """(module, rest) of a tensor's name; some methods write `module.weight.absmax`."""
    module, separator, rest = name.partition(".weight.")
    if separator:
        return module, f"weight.{rest}"
    module, _, rest = name.rpartition(".")
    return module, rest


def _counter(settings: Settings, scheme: str) -> _Count:
    """The counting function of the method that wrote the checkpoint."""
    family = str(settings.get("quant_method", "")).lower()
    for method in METHODS:
        if family and any(fnmatch(family, pattern) for pattern in method.families):
            return method.count_weights
    found = method_of(scheme)
    return count_weights if found is None else found.count_weights


def _kind(module: str, *, has_head: bool) -> str:
    if _TOWER.search(module):
        return OTHER
    if _LAYER.search(f"{module}."):
        return LAYER
    return HEAD if (_HEAD if has_head else _EMBEDDING).search(module) else OTHER


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def table(bits: Bits) -> list[tuple[str, str, int, int, float | None]]:
    """(modules, kind, weights, bytes, bits for each weight), equal neighbouring layers in one line.

    Weights and bytes are those of one of them.
    """
    by_place: dict[str, list[Module]] = {}
    for module in bits.modules:
        by_place.setdefault(_NUMBER.sub(".*.", f"{module.name}.", count=1)[:-1], []).append(module)
    return [line for place, modules in by_place.items() for line in _lines(place, modules)]


def _lines(
    place: str, modules: Iterable[Module]
) -> Iterable[tuple[str, str, int, int, float | None]]:
    for (num_weights, num_bytes), equal in groupby(
        modules, key=lambda module: (module.num_weights, module.num_bytes)
    ):
        first, *others = equal
        name = first.name
        if others:
            names = [_NUMBER.search(f"{m.name}.") for m in (first, others[-1])]
            start, end = (match[0].strip(".") for match in names if match)
            name = place.replace("*", f"{start}-{end}", 1)
        yield name, first.kind, num_weights, num_bytes, first.bits_per_weight


@dataclass(frozen=True, slots=True)
class StoredBits:
    """The bits of what ran. None where no file and no engine says it."""

    layers: float | None  # bits for each weight
    head: float | None
    num_bytes: int | None  # of all weights


def stored_bits(model: ModelFacts, output: Output) -> StoredBits:
    """Bits of the checkpoint that an output was computed with: the model's own, or one made of it.

    A plain checkpoint that the engine quantizes while it loads it is stored nowhere: then the
    engine's report of what it holds is taken.
    """
    if model.made_by is not None:
        from batchinfer.making.cached import cached_checkpoint

        return _stored(read_bits(str(cached_checkpoint(model))))
    if not model.weights_bytes:  # invented by the engine
        return StoredBits(None, None, None)
    folder = read_folder(ModelSettings.model_construct(path=model.path))
    bits = bits_of(folder)
    if folder.checkpoint.scheme != "plain" or model.engine_quantization is None:
        return _stored(bits)
    if output.num_parts > 1:
        return StoredBits(None, None, None)
    return _online(bits, output, DTYPE_BYTES[model.dtype], model.vocab_size)


def _stored(bits: Bits) -> StoredBits:
    return StoredBits(bits.per_weight(LAYER), bits.per_weight(HEAD), bits.num_bytes or None)


def _online(bits: Bits, output: Output, dtype_bytes: int, vocab_size: int) -> StoredBits:
    """What the engine holds less what is not of the layers, which stays in the model's dtype
    (embeddings filled up as the engine's table says).
    """
    num_bytes, num_weights = output.loaded.get("weights_bytes"), bits.num_weights(LAYER)
    if not isinstance(num_bytes, int) or not num_weights:
        return StoredBits(None, None, None)
    multiple = support_of(Machine(None, engine=output.engine_name)).vocabulary_multiple
    filled = -vocab_size % multiple / vocab_size
    others = sum(
        module.num_weights * (1 + (filled if _is_vocabulary(module.name) else 0))
        for module in bits.modules
        if module.kind != LAYER
    )
    of_layers = 8 * (num_bytes - others * dtype_bytes) / num_weights
    return StoredBits(of_layers, 8.0 * dtype_bytes, num_bytes)


def _is_vocabulary(module: str) -> bool:
    return bool(_HEAD.search(module) or _EMBEDDING.search(module))
