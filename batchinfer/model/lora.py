"""A LoRA adapter's folder: that it is whole, that the engine runs such adapters, that it fits the
model.

Everything is read from adapter_config.json and from headers; only the digest reads the weights, as
adapters of one shape differ in nothing else. Must not know: what an engine runs; its table says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.folder import file_sha256, read_json, resolve_folder
from batchinfer.model.weights import read_header
from batchinfer.quantization import (
    OTHER_FAMILIES,
    DeviceSupport,
    Machine,
    Tensor,
    record_of,
    support_of,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
#: Dtypes in which a weight has the shape [out, in]; others are packed.
_UNPACKED = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True, slots=True)
class Lora:
    """`path` is a local folder; `digest` is of its content: file -> sha256."""

    path: str
    rank: int  # the largest of its layers
    modules: tuple[str, ...]  # kinds of layers that it changes, by the last word of their names
    num_layers: int  # that it changes
    digest: Mapping[str, str]


def read_lora(
    path: str, base: Mapping[str, Tensor], machine: Machine, key: str = "model.lora"
) -> Lora:
    """Facts of the adapter at `path`, for a model with the tensors of `base` (empty: unknown) on
    the machine's engine. `key`: what names it in the job.

    Raises ConfigError.
    """
    folder = resolve_folder(path, key, None)
    config = read_json(folder / CONFIG_NAME, f"{key}: an adapter folder needs it")
    support = support_of(machine)
    if (why := support.why_no_adapter(config)) is not None:
        raise ConfigError(f"{folder / CONFIG_NAME}: {why}")
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: copy the whole adapter folder, or save the adapter as safetensors"
        )
    pairs = _pairs(read_header(file)[1], file)
    rank = max(_rank_of(config, folder / CONFIG_NAME), *(a.shape[0] for a, _ in pairs.values()))
    if support.max_adapter_rank is not None and rank > support.max_adapter_rank:
        raise ConfigError(
            f"{folder}: the adapter's rank {rank} is above {support.title}'s "
            f"{support.max_adapter_rank}"
        )
    if base:
        _check_fit(pairs, base, file, is_transposed=bool(config.get("fan_in_fan_out")))
    digest = {f"lora/{name}": file_sha256(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    modules = tuple(sorted({_kind(module) for module in pairs}))
    return Lora(str(folder), rank, modules, len(pairs), digest)


def check_beside(name: str, machine: Machine) -> None:
    """Raise ConfigError if no adapter runs beside the quantization `name` on this machine."""
    if name in OTHER_FAMILIES:
        return  # the engine's to say
    device = record_of(name).on(machine)
    if isinstance(device, DeviceSupport) and device.refused_adapters:
        raise ConfigError(
            f"model.lora cannot run here with quantization {name}: {device.refused_adapters}. "
            "Give the unquantized model or another quantization, or leave the adapter out"
        )


def _rank_of(config: Mapping[str, Any], file: Path) -> int:
    ranks: list[Any] = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(value, int) and value > 0 for value in ranks):
        raise ConfigError(f"{file}: r and rank_pattern must be whole numbers of at least 1")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigError(f"{file} has no lora_alpha: copy it again")
    if not config.get("target_modules"):
        raise ConfigError(f"{file} has no target_modules: copy it again")
    return max(map(int, ranks))


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> its factors A [rank, in] and B [out, rank]; of an embedding A is [rank, vocab]."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for side in ("A", "B"):
            for ending in (f".lora_{side}.weight", f".lora_embedding_{side}"):
                if name.endswith(ending):
                    module = name.removesuffix(ending).removeprefix(_PREFIX)
                    sides.setdefault(module, {})[side] = tensor
    if not sides:
        raise ConfigError(f"{file} holds no LoRA weights (lora_A, lora_B): copy it again")
    pairs = {}
    for module, found in sides.items():
        a, b = found.get("A"), found.get("B")
        if a is None or b is None or a.shape[0] != b.shape[-1]:
            raise ConfigError(f"{file}: lora_A and lora_B of {module} do not belong together")
        pairs[module] = (a, b)
    return pairs


def _check_fit(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    base: Mapping[str, Tensor],
    file: Path,
    *,
    is_transposed: bool,
) -> None:
    """Refuse an adapter of another model. Packed weights show that a module is there, no more."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, tensor in base.items():
        module, _, part = name.rpartition(".")
        found = shapes.setdefault(_within_layers(module), [])
        if part == "weight" and tensor.dtype in _UNPACKED and len(tensor.shape) == 2:
            found.append(tensor.shape)
    for module, (a, b) in pairs.items():
        known = shapes.get(_within_layers(module))
        if ".experts" in module or (known is None and module.endswith("lm_head")):
            continue  # stored in too many ways; the embedding's, if tied
        if known is None:
            raise ConfigError(
                f"{file} changes {module}, which the model does not have: it is the adapter of "
                "another model"
            )
        shape = (b.shape[0], a.shape[1])
        is_turned = is_transposed or module.endswith("embed_tokens")
        if known and shape not in known and not (is_turned and shape[::-1] in known):
            raise ConfigError(
                f"{file} changes {module} of {shape[0]} x {shape[1]}, the model's has "
                f"{' x '.join(map(str, known[0]))}: it is the adapter of another model"
            )


def _kind(module: str) -> str:
    return "experts" if ".experts" in module else module.rpartition(".")[2]


def _within_layers(module: str) -> str:
    """From the layer's number on: what is before differs between writers of checkpoints."""
    _, separator, rest = module.partition(".layers.")
    return rest if separator else module.removeprefix("model.")
