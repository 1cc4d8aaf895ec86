"""Checkpoints of QTIP and EXL3: what their settings and tensors' names and shapes say.

A coded layer is its `trellis`, int16 [in / 16, out / 16, 16 K], with `suh` [in] and `svh` [out],
the signs and scales of both sides, each side padded to a multiple of 128. EXL3 names a layer's code
by an empty-handed tensor beside it (`mcg` or `mul1`; none: 3inst) and keeps older layers' signs as
bits (`su`, `sv`). Ours (`qtip`) names codes in config.json:

    {"quant_method": "qtip", "format_version": 1, "L": 16, "T": 256, "lane_order": "exl3",
     "had_in": "block128", "had_out": "block128", "default": {"K": 2, "V": 1, "code": "mcg"},
     "modules": {"model.layers.0.mlp.down_proj": {"K": 3, "V": 1, "code": "mul1"}}}

with `tlut` [2^Q, 2] beside a layer of code `hyb`, and `had_in`, `had_out` [q, q] beside one whose
Hadamard of a whole side (`full`) is more than Sylvester's. Must not know: torch, vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization.methods.base import Loading, Settings, Stored, Tensor
from batchinfer.quantization.methods.base import count_weights as count_others
from batchinfer.quantization.methods.qtip.which import (
    lost_layers,
    mixed_layers,
    neither,
    wrong_sizes,
)

#: Of checkpoints whose Hadamards are of whole sides, as QTIP's own.
FULL_SCHEME = "qtip-full"
#: Of QTIP's own models, as its code writes them.
RELAXML_SCHEME = "qtip-relaxml"
FORMAT_VERSION = 1
BLOCK = 128
TILE = 16
#: Code -> weights of a state.
CODES: Mapping[str, int] = {"3inst": 1, "mcg": 1, "mul1": 1, "1mad": 1, "hyb": 2}
#: Tensors that name a code, of EXL3.
MARKERS = ("mcg", "mul1")
#: All that may stand beside a trellis, except a bias.
PARTS = ("trellis", "suh", "svh", "su", "sv", *MARKERS, "tlut", "had_in", "had_out")
_SCALE_DTYPES = ("F16", "BF16", "F32")
_HAD_DTYPES = ("I8", *_SCALE_DTYPES)
_LANE_ORDERS = ("exl3", "qtip")
_HADAMARDS = ("block128", "full")
_PADDED = "sizes are padded to multiples of 128"


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """How the tensors of one layer are to be read. What `codes`, `trellis` and `dense` take."""

    code: str
    lane_order: str = "exl3"
    has_full_in: bool = False
    has_full_out: bool = False


def unknown_format(settings: Settings) -> str:
    """In words, what of our settings this version cannot read; "" if nothing.

    A KeyError names a setting that is missing.
    """
    for key, known in (("format_version", FORMAT_VERSION), ("L", 16), ("T", 256)):
        if settings[key] != known:
            return f"{key} {settings[key]!r}"
    for key, known_words in (
        ("lane_order", _LANE_ORDERS),
        ("had_in", _HADAMARDS),
        ("had_out", _HADAMARDS),
    ):
        if (word := settings.get(key, known_words[0])) not in known_words:
            return f"{key} {word!r}"
    for layer in (settings["default"], *settings.get("modules", {}).values()):
        if layer.get("unquantized"):
            continue
        code = layer.get("code", settings["default"]["code"])
        if code not in CODES:
            return f"code {code!r}"
        if layer.get("V", CODES[code]) != CODES[code]:
            return f"V {layer['V']!r} of code {code}"
    return ""


def format_of(settings: Settings, module: str, parts: Mapping[str, Any]) -> LayerFormat:
    """A layer's format by its name in the checkpoint. `parts`: those of its tensors that exist.

    Raises ValueError for two codes at once.
    """
    marked = [marker for marker in MARKERS if marker in parts]
    if len(marked) > 1:
        raise ValueError(f"it has two codes at once, {' and '.join(marked)}")
    if settings.get("quant_method") == "exl3":
        return LayerFormat(marked[0] if marked else "3inst")
    said = {**settings["default"], **settings.get("modules", {}).get(module, {})}
    code = said["code"]
    if marked and marked[0] != code:
        raise ValueError(f"config.json says code {code}, and a tensor beside it {marked[0]}")
    return LayerFormat(
        code,
        settings.get("lane_order", "exl3"),
        settings.get("had_in") == "full",
        settings.get("had_out") == "full",
    )


def layers_of(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module -> its tensors by the last part of their names, of modules that have a trellis."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            found.setdefault(module, {})[part] = tensor
    return {module: parts for module, parts in found.items() if _is_layer(parts)}


def _is_layer(parts: Mapping[str, Any]) -> bool:
    return "trellis" in parts or not {"suh", "svh"}.isdisjoint(parts)


def check_stored(stored: Stored) -> None:
    """Raise ConfigError for layers whose tensors cannot be what the settings say."""
    layers = layers_of(stored.tensors)
    if stored.scheme == RELAXML_SCHEME:
        return  # of no use before it is converted
    if not layers:
        raise stored.not_as_said()
    for module, parts in layers.items():
        wrong = next(_wrong(stored.settings, module, parts), None)
        if wrong is None and f"{module}.weight" in stored.tensors:
            wrong = "it has a trellis and a weight"
        if wrong:
            raise ConfigError(
                f"{stored.folder}: {module}: {wrong}. The checkpoint is damaged or of another "
                "format: copy it again, or quantize the model again"
            )
    _check_modules(stored, layers)
    _check_model(stored, layers)


def _check_modules(stored: Stored, layers: Mapping[str, Any]) -> None:
    for module, said in stored.settings.get("modules", {}).items():
        if bool(said.get("unquantized")) == (module in layers):
            what = "unquantized" if said.get("unquantized") else "quantized"
            raise stored.contradiction(
                f"that {module} is {what}, and it has {'a' if module in layers else 'no'} trellis"
            )


def _check_model(stored: Stored, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """What layers show of each other, and config.json of them, by the names that most models have.

    What vLLM would find while it loads, or never.
    """
    plain = {
        name.removesuffix(".weight")
        for name, tensor in stored.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    is_tied = stored.text.get("tie_word_embeddings") is not False
    if stored.settings.get("quant_method") == "exl3":  # codes the output layer of every model
        is_tied = False
    lost = next(lost_layers(layers.keys(), plain, is_tied=is_tied), None)
    if lost is not None:
        raise ConfigError(f"{stored.folder}: {neither(*lost)}")
    sizes = {m: (TILE * p["trellis"].shape[0], TILE * p["trellis"].shape[1])
             for m, p in layers.items()}  # fmt: skip
    hidden = stored.text.get("hidden_size")
    wrong = [*mixed_layers(layers.keys(), plain), *wrong_sizes(sizes, padded(hidden or 0))]
    if wrong:
        module, what = wrong[0]
        raise ConfigError(
            f"{stored.folder}: {module}: {what}. The checkpoint is damaged or of another model: "
            "copy it again, or quantize the model again"
        )


def padded(size: int) -> int:
    """The next multiple of 128."""
    return -(-size // BLOCK) * BLOCK


def _wrong(settings: Settings, module: str, parts: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with one layer, in words."""
    yield from missing(parts)
    try:
        layer = format_of(settings, module, parts)
    except ValueError as error:
        yield str(error)
        return
    trellis = parts["trellis"]
    shape = list(trellis.shape)
    if trellis.dtype != "I16":
        yield f"its trellis is {trellis.dtype}, and not int16"
    yield from wrong_shape(shape)
    num_bits = shape[2] // TILE
    said = {**settings.get("default", {}), **settings.get("modules", {}).get(module, {})}
    if said.get("K", num_bits) != num_bits:
        yield f"config.json says {said['K']} bits, and its trellis {shape} has {num_bits}"
    for side, size in zip(("in", "out"), shape, strict=False):
        name = {"in": "suh", "out": "svh"}[side]
        scales = parts.get(name)
        if scales is not None and scales.shape != (TILE * size,):
            yield f"{name} is {list(scales.shape)} beside {TILE * size} {side}puts of the trellis"
        if scales is not None and scales.dtype not in _SCALE_DTYPES:
            yield f"{name} is {scales.dtype}, and not one of {', '.join(_SCALE_DTYPES)}"
        signs = parts.get(name[:2])
        if signs is not None and (signs.dtype, signs.shape) != ("I16", (size,)):
            found = f"{signs.dtype} {list(signs.shape)}"
            yield f"{name[:2]} is {found} beside {TILE * size} {side}puts, and not I16 [{size}]"
        had = parts.get(f"had_{side}")
        is_full = layer.has_full_in if side == "in" else layer.has_full_out
        if had is not None and had.dtype not in _HAD_DTYPES:
            yield f"had_{side} is {had.dtype}, and not one of {', '.join(_HAD_DTYPES)}"
        yield from wrong_hadamard(side, TILE * size, had and had.shape, is_full=is_full)
    tlut = parts.get("tlut")
    if tlut is not None and not _is_tlut(tlut):
        yield f"its table (tlut) is {tlut.dtype} {list(tlut.shape)}, and not F16 [2^Q, 2]"
    if (layer.code == "hyb") != ("tlut" in parts):
        yield f"code {layer.code} has {'no' if layer.code == 'hyb' else 'a'} table (tlut)"


def _is_tlut(tensor: Tensor) -> bool:
    size = tensor.shape[0] if len(tensor.shape) == 2 and tensor.shape[1] == 2 else 0
    return tensor.dtype == "F16" and size in {1 << bits for bits in range(16)}


def wrong_hadamard(
    side: str, size: int, shape: tuple[int, ...] | None, *, is_full: bool
) -> Iterator[str]:
    """In words, why a side ("in" or "out") of this size cannot have such a `had_in` or `had_out`.

    `shape`: None if it has none.
    """
    if shape is not None and not is_full:
        yield f"it has a had_{side}, and config.json says nothing of a Hadamard of that whole side"
    elif is_full and (shape is None or shape == (1, 1)):
        if size & (size - 1):
            yield f"it has no had_{side}, which {size} {side}puts need, as no power of two"
    elif shape is not None:
        num_odd = shape[0] if len(shape) == 2 and shape[0] == shape[1] else 0
        width = size // num_odd if num_odd else 0
        if not width or width * num_odd != size or width & (width - 1):
            wanted = "[q, q] with a power of two times q of them"
            yield f"had_{side} is {list(shape)} beside {size} {side}puts, and not {wanted}"


def missing(parts: Mapping[str, Any]) -> Iterator[str]:
    """In words, what a layer lacks."""
    if "trellis" not in parts:
        yield f"it has {' and '.join(sorted(parts))} and no trellis"
    for side, scales, signs in (("inputs", "suh", "su"), ("outputs", "svh", "sv")):
        if scales not in parts and signs not in parts:
            yield f"it has no {scales}, the signs and scales of its {side}"


def wrong_shape(shape: list[int]) -> Iterator[str]:
    """In words, why a trellis cannot have this shape."""
    wanted = "[in / 16, out / 16, 16 K] with K from 1 to 8"
    if len(shape) != 3 or shape[2] % TILE or not 1 <= shape[2] // TILE <= 8:
        yield f"its trellis is {shape}, and not {wanted}"
        return
    for side, size in zip(("in", "out"), shape, strict=False):
        if not size:
            yield f"its trellis {shape} has no {side}puts"
        if TILE * size % BLOCK:
            yield (
                f"its trellis {shape} has {TILE * size} {side}puts, and {BLOCK} does not divide "
                f"them ({_PADDED})"
            )


def loaded_bytes(loading: Loading, name: str, tensor: Tensor) -> int:
    """As stored, or decoded: on a CPU, and with Hadamards that kernels do not know."""
    if loading.scheme != FULL_SCHEME:
        if loading.device != "cpu":
            return tensor.num_bytes
        if loading.keeps_packed:  # scales are float32 there
            return tensor.num_bytes * (1 if name.endswith(".trellis") else 2)
    return _num_weights(tensor) * loading.dtype_bytes if name.endswith(".trellis") else 0


def count_weights(settings: Settings, module: str, parts: Mapping[str, Tensor]) -> int:
    """See `Method.count_weights`: padding counts."""
    if "trellis" not in parts:
        return count_others(settings, module, parts)
    return _num_weights(parts["trellis"])


def _num_weights(trellis: Tensor) -> int:
    return math.prod(trellis.shape[:-1]) * TILE**2
