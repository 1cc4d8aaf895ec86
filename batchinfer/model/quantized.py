"""Where a model folder says how its weights are quantized: methods have their own places for it.

Must not know: any method, what the settings mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.folder import read_optional_json
from batchinfer.quantization import METHODS


def quantization_settings(
    config: Mapping[str, Any], text: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any] | None, Path]:
    """The settings, None if there are none, and the file that has them.

    `config`: config.json; `text`: what of it is the language model's. Raises ConfigError.
    """
    file = folder / "config.json"
    for source in (config, text):
        for key in ("quantization_config", "compression_config"):
            if isinstance(settings := source.get(key), dict):
                return settings, file
    for method in METHODS:
        if isinstance(settings := config.get(method.settings_key), dict):
            return {"quant_method": method.settings_key, **settings}, file
    for method in METHODS:
        if method.settings_file and (own := folder / method.settings_file).exists():
            settings = read_optional_json(own).get("quantization")
            if not isinstance(settings, dict | None):
                raise ConfigError(
                    f"{own}: quantization is {settings!r}, not an object of settings: copy it again"
                )
            if settings is not None:
                return settings, own
    for method in METHODS:
        for name, family in method.unread_files.items():
            if (unread := folder / name).exists():
                raise ConfigError(
                    f"{unread} says how the model is quantized, but config.json does not: put its "
                    f'content there as quantization_config, with "quant_method": "{family}"'
                )
    return None, file
