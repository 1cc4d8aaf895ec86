"""What a checkpoint is, from the settings each family of quantized checkpoints writes.

Must not know: what runs where, whole model folders. Invariant: a family or a scheme that is not
known is an error that names it, never taken for something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization.recipes import RECIPES
from batchinfer.quantization.table import SCHEMES, name_of

GGUF_MAGIC = b"GGUF"

#: Families that vLLM reads and that have no name here: `auto` leaves them to vLLM.
OTHER_FAMILIES = frozenset(
    {
        "auto-round",
        "deepseek_v4_fp8",
        "experts_int8",
        "fbgemm_fp8",
        "fp_quant",
        "humming",
        "inc",
        "intel/auto-round",
        "modelopt_mixed",
        "moe_wna16",
        "quark",
        "torchao",
    }
)

_AWQ = ("awq", "awq_marlin", "auto_awq")
_GPTQ = ("gptq", "gptq_marlin", "auto_gptq")
#: Their settings with which vLLM computes as they stand in config.json.
_NUMBERS = ("bits", "w_bit", "group_size", "q_group_size", "desc_act", "sym")

#: Several schemes that are known, in layers of one checkpoint: vLLM sorts them out.
_MIXED = "mixed"

_MODELOPT_ALGORITHMS = {
    "fp8": "fp8-tensor",
    "fp8_per_channel_per_token": "fp8-channel",
    "fp8_pb_wo": "fp8-block",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "w4a16_nvfp4": "nvfp4",
    "mixed_precision": _MIXED,
}

_SIMPLE_FAMILIES = {
    "mxfp4": "mxfp4",
    "gpt_oss_mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "exl3": "exl3",
    "qtip": "qtip",
    "gguf": "gguf",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`scheme` is a key of SCHEMES, or the name of a family that only vLLM knows."""

    scheme: str
    family: str  # quant_method as the checkpoint writes it; "" if it is unquantized
    has_experts: bool = False  # as its tensors' names say
    has_act_order: bool = False  # GPTQ's: groups of inputs that do not lie side by side
    dtype: str = ""  # of what is not quantized; "" if nothing says so

    @property
    def words(self) -> str:
        """For messages: what it is, and what says so."""
        what = SCHEMES.get(self.scheme, self.scheme)
        return f"{what} (quant_method {self.family})" if self.family else what


def detect(settings: Mapping[str, Any] | None, source: str) -> Checkpoint:
    """What `settings` (config.json's quantization_config, or its like) say the checkpoint is.

    `source` is the file for messages. Raises ConfigError for a family or scheme nobody knows.
    """
    if not settings:
        return Checkpoint("plain", "")
    family = str(settings.get("quant_method") or "").lower()
    if _is_cache_only(family, settings):
        return Checkpoint("plain", "")
    if not family and settings.get("quant_algo"):
        family = "modelopt"
    if family in OTHER_FAMILIES:
        return Checkpoint(family, family)
    _refuse_texts(family, settings, source)
    try:
        scheme = _scheme(family, settings)
        has_act_order = _has_act_order(family, settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source}: the quantization settings of family {family!r} lack {error}: copy the "
            "checkpoint again"
        ) from error
    if scheme is None:
        raise ConfigError(
            f"{source}: quant_method {family or 'missing'!r} is none that this version knows: take "
            "another checkpoint of the model"
        )
    if scheme == _MIXED:
        return Checkpoint(f"{family}, several schemes", family, has_act_order=has_act_order)
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{source}: {family} with {scheme} is a scheme that this version does not know: take "
            "another checkpoint of the model"
        )
    return Checkpoint(scheme, family, has_act_order=has_act_order)


def _refuse_texts(family: str, settings: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for numbers in quotation marks, with which vLLM computes as they are."""
    for key in _NUMBERS if family in (*_AWQ, *_GPTQ) else ():
        if isinstance(value := settings.get(key), str):
            raise ConfigError(
                f"{source}: {key} is the text {value!r}, which vLLM does not take for a number or "
                "a truth: write it there without quotation marks"
            )


def _has_act_order(family: str, settings: Mapping[str, Any]) -> bool:
    if family == "compressed-tensors":
        groups = settings["config_groups"].values()
        orders = [group["weights"].get("actorder") for group in groups if group.get("weights")]
        return any(order is True or str(order).lower() in ("group", "dynamic") for order in orders)
    if family not in _GPTQ:
        return False
    return bool(settings.get("desc_act")) and settings.get("group_size") != -1


def _is_cache_only(family: str, settings: Mapping[str, Any]) -> bool:
    """Whether the settings say how the KV cache is kept, and nothing of the weights.

    Other families name it beside weights that they quantize (AutoFP8 does).
    """
    inner = settings.get("quantization")
    of_modelopt = inner if isinstance(inner, Mapping) else settings
    is_said = settings.get("kv_cache_scheme")
    if not family or family.startswith("modelopt"):
        is_said = is_said or of_modelopt.get("kv_cache_quant_algo")
    elif family != "compressed-tensors":
        return False
    return bool(is_said) and not settings.get("config_groups") and not of_modelopt.get("quant_algo")


def _scheme(family: str, settings: Mapping[str, Any]) -> str | None:
    """A key of SCHEMES, or words for a scheme that is none; None for an unknown family."""
    match family:
        case _ if family in _AWQ:
            num_bits = settings.get("bits") or settings["w_bit"]
            return "awq" if num_bits == 4 else f"{num_bits} bits"
        case _ if family in _GPTQ:
            num_bits, is_symmetric = settings["bits"], settings.get("sym", True)
            if num_bits not in (4, 8) or not is_symmetric:
                return f"{num_bits} bits{'' if is_symmetric else ', asymmetric'}"
            return "gptq" if num_bits == 4 else "gptq-8bit"
        case "compressed-tensors":
            return _of_groups(settings["config_groups"])
        case "fp8":
            return "fp8-block" if settings.get("weight_block_size") else "fp8-tensor"
        case "bitsandbytes":
            return "bnb-8bit" if settings.get("load_in_8bit") else "bnb-4bit"
        case _ if family.startswith("modelopt"):
            algorithm = str(settings.get("quant_algo") or settings["quantization"]["quant_algo"])
            return _MODELOPT_ALGORITHMS.get(algorithm.lower(), f"quant_algo {algorithm}")
    return _SIMPLE_FAMILIES.get(family)


def _of_groups(groups: Mapping[str, Any]) -> str:
    """compressed-tensors: groups of layers, each with settings of its own."""
    of_weights = [group for group in groups.values() if group.get("weights")]  # others: attention
    if not of_weights:
        return "no config_groups of weights"
    schemes = {_of_group(group) for group in of_weights}
    if unknown := sorted(schemes - SCHEMES.keys()):
        return unknown[0]
    return schemes.pop() if len(schemes) == 1 else _MIXED


def _of_group(group: Mapping[str, Any]) -> str:
    weights = group["weights"]
    activations = group.get("input_activations")
    kind, num_bits = weights.get("type", "int"), _number(weights["num_bits"])
    strategy, group_size = weights.get("strategy"), _number(weights.get("group_size"))
    of_activations = None
    if activations:
        of_activations = (activations.get("type", "int"), _number(activations["num_bits"]))
    if of_activations and kind == "int" and not weights.get("symmetric", True):
        kind = "asymmetric int"  # vLLM has no kernel for them beside quantized activations
    match kind, num_bits:
        case "int", 8 | 4 if of_activations in (None, ("int", 8)):
            return f"w{num_bits}a{8 if of_activations else 16}"
        case "float", 8 if strategy == "group" and group_size == 32:
            return "mxfp8"
        case "float", 8 if strategy in ("tensor", "channel", "block"):
            return f"fp8-{strategy}"
        case "float", 4 if strategy == "tensor_group" and group_size == 16:
            return "nvfp4"
        case "float", 4 if strategy == "group" and group_size == 32:
            return "mxfp4"
    text = f"{num_bits}-bit {kind} weights by {strategy}"
    if of_activations:
        text += f" and {of_activations[1]}-bit {of_activations[0]} activations"
    return text


def _number(value: Any) -> Any:
    """As compressed-tensors reads it, to which "8" is 8."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def meant_by(word: str) -> str | None:
    """The name for what other programs call `word`: a scheme, a preset, a family of checkpoints.

    auto for a family of several schemes, None for an unknown word.
    """
    word = word.lower()
    presets = {recipe.preset.lower(): recipe.makes for recipe in RECIPES.values()}
    if word in presets:
        return presets[word]
    scheme = word.replace("_", "-").replace("-per-", "-")
    if scheme not in SCHEMES:
        try:
            scheme = _scheme(word, {"bits": 4}) or ""
        except KeyError:  # its settings tell
            return "auto"
    if scheme in SCHEMES:
        return name_of(scheme)
    return "auto" if word in OTHER_FAMILIES else None


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False
