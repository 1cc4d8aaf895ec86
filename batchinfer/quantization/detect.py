"""What a checkpoint is, as the method that knows its family reads the settings.

Must not know: what runs where, whole model folders. Invariant: a family or a scheme that is not
known is an error that names it, never taken for something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization.methods import METHODS, Method
from batchinfer.quantization.methods.base import MIXED
from batchinfer.quantization.table import RECIPES, SCHEMES, name_of

#: Families that engines read and that have no name here: `auto` leaves them to the engine.
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`scheme` is a key of SCHEMES, or the name of a family that only the engine knows."""

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
    if any(method.is_cache_only(family, settings) for method in METHODS):
        return Checkpoint("plain", "")
    family = family or next(filter(None, (m.unnamed_family(settings) for m in METHODS)), "")
    if family in OTHER_FAMILIES:
        return Checkpoint(family, family)
    method = _method_of_family(family)
    if method is None:
        raise ConfigError(
            f"{source}: this version does not know quant_method {family or 'missing'!r}: take "
            "another checkpoint of the model"
        )
    _refuse_texts(method, settings, source)
    try:
        scheme = method.scheme_of(family, settings)
        has_act_order = method.has_act_order(settings)
    except KeyError as error:
        raise ConfigError(
            f"{source}: the quantization settings of family {family!r} lack {error}: copy the "
            "checkpoint again"
        ) from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source}: the quantization settings are not of the form that family {family!r} has "
            f"({error}): copy the checkpoint again"
        ) from error
    if scheme == MIXED:
        return Checkpoint(f"{family}, several schemes", family, has_act_order=has_act_order)
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{source}: this version does not know the scheme {family} with {scheme}: take "
            "another checkpoint of the model"
        )
    return Checkpoint(scheme, family, has_act_order=has_act_order)


def _method_of_family(family: str) -> Method | None:
    for method in METHODS:
        if any(fnmatchcase(family, pattern) for pattern in method.families):
            return method
    return None


def _refuse_texts(method: Method, settings: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for numbers in quotation marks, with which engines compute as they are."""
    for key in method.number_keys:
        if isinstance(value := settings.get(key), str):
            raise ConfigError(
                f"{source}: {key} is the string {value!r}, which engines do not read as a number "
                "or a boolean: write it without quotation marks"
            )


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
        method = _method_of_family(word)
        try:
            scheme = method.scheme_of(word, {"bits": 4}) if method is not None else ""
        except KeyError:  # its settings say
            return "auto"
    if scheme in SCHEMES:
        return name_of(scheme)
    return "auto" if word in OTHER_FAMILIES else None
