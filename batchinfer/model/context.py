"""How many tokens a prompt and its completion may have, from the model's and tokenizer's settings.

Must not know: weights, engines' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.folder import read_optional_json

# Those that models are published with; vLLM derives the length from the same.
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_ROPE_WITHOUT_FACTOR = frozenset(
    {
        "su",
        "longrope",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
    }
)


def context_length(
    asked: int | None,
    config: dict[str, Any],
    text: dict[str, Any],
    tokenizer_folder: Path,
    notes: list[str],
) -> int:
    """The one asked for, or the model's own. `notes` get what to know of it.

    Raises ConfigError.
    """
    lengths = [text[key] for key in _LENGTH_KEYS if _is_length(text.get(key))]
    if _is_length(text.get("model_max_length")):  # Cohere's models mean this one
        lengths = [text["model_max_length"]]
    settings = read_optional_json(tokenizer_folder / "tokenizer_config.json")
    if _is_length(settings.get("model_max_length")):
        lengths.append(settings["model_max_length"])
    if not lengths:
        if asked is None:
            raise ConfigError("config.json names no context length: set model.max_model_len")
        return asked
    ropes = list(_rope_settings(text))
    factor = 1.0
    if "gemma3" not in str(config.get("model_type")):  # its length is already the scaled one
        for rope in ropes:
            if _rope_type(rope) not in _ROPE_WITHOUT_FACTOR:
                factor = rope.get("factor") or factor
        if not _is_length(factor):
            raise ConfigError(
                f"config.json has the rope factor {factor!r}, which is not a number. Copy it again"
            )
    own: int = math.floor(min(lengths) * factor)
    if asked is not None and asked > own:
        raise ConfigError(
            f"model.max_model_len {asked} is more than the model's context length of {own} tokens: "
            "lower it or leave it out"
        )
    if asked is not None:
        return asked
    original = text.get("original_max_position_embeddings")
    if isinstance(original, int) and any(_rope_type(rope) == "longrope" for rope in ropes):
        notes.append(
            f"max_model_len is {original}, the length before longrope; set model.max_model_len for "
            f"more, up to {own}"
        )
        return original
    return own


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _rope_settings(text: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One for the model, or one for each kind of layer."""
    settings = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(settings, dict):
        nested = [value for value in settings.values() if isinstance(value, dict)]
        yield from nested or [settings]


def _rope_type(rope: dict[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type"))
