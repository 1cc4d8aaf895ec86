"""Which settings of the score job an evaluation may change: how it is computed, never of what.

Must not know: specs, options' values, how anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from batchinfer.config.problems import settings as job_settings
from batchinfer.errors import ConfigError

#: Sections of a job whose settings an evaluation may set. The others say what is scored.
SECTIONS = ("model", "engine", "packing", "checkpoint", "limits")

#: What the arguments and options of `perplexity` say instead.
_OPTIONS = {
    "model.path": "the argument MODEL",
    "model.quantization": "--quantization",
    "model.dtype": "--dtype",
    "input": "--data and --column",
    "score.context": "--context",
    "score.stride": "--stride",
    "score.top_logprobs": "--top-k",
    "output": "--work",
    "name": "--label",
}


def is_allowed(key: str) -> bool:
    """Whether `key` is a job's dotted key in one of the sections."""
    is_known = key in job_settings() or key.startswith("engine.options.")
    return is_known and key.partition(".")[0] in SECTIONS


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that would make it another measurement than is recorded."""
    for key, value in settings.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # "\\ud800" in YAML
            raise ConfigError(f"--set {key}: the value is not valid text") from None
        instead = _OPTIONS.get(key) or _OPTIONS.get(key.partition(".")[0])
        if instead is not None:
            raise ConfigError(f"--set {key}: it is part of what is measured: use {instead}")
        if is_allowed(key):
            continue
        hint = "" if not isinstance(value, dict) else ", such as engine.max_num_seqs=8"
        raise ConfigError(
            f"--set {key}: not a setting that a measurement may have: give dotted keys of the job "
            f"file's sections {', '.join(SECTIONS)}{hint}"
        )
