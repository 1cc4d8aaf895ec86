"""What a job's `engine.options` say beside the engine arguments that follow from its other keys.

An option of the job stands above the argument; a mapping keeps the keys that it does not say. What
would undo another key of the job is refused. Must not know: how arguments are used. vLLM is
imported by `with_configs` alone, as `validate` asks the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchinfer.config.values import shown
from batchinfer.engine.vllm.errors import first_line, rejections
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError
from batchinfer.quantization.methods import plugins

#: vLLM writes into these and leaves a mapping as it is: argument -> class of `vllm.config`.
_WRITTEN = {
    "structured_outputs_config": "StructuredOutputsConfig",
    "reasoning_config": "ReasoningConfig",
}
_COMPILER = "structured_outputs_config"


def check_beside(settings: VllmSettings) -> None:
    """Raise ConfigError for an option that would undo what another key of the job asks for."""
    for problem in _problems(settings):
        raise ConfigError(problem)


def _problems(settings: VllmSettings) -> Iterator[str]:
    options = settings.options
    for plugin in plugins(settings.quantization):
        for name, value in plugin.arguments.items():
            if options.get(name, value) != value:
                yield (
                    f"engine.options.{name}: {shown(options[name])} and quantization by "
                    f"{plugin.name} do not go together: it needs {shown(value)}. Remove the option"
                )
    named = options.get("lora_target_modules")
    if named is not None:
        changed = {module for lora in settings.loras for module in lora.modules}
        if left := sorted(changed.difference(named)):
            yield (
                f"engine.options.lora_target_modules leaves out {', '.join(left)}, which an "
                "adapter of the job changes: vLLM would pass over that part of it. Remove the "
                "option: it follows from the adapters"
            )
    transfer = options.get("kv_transfer_config")
    if settings.has_save_mode and isinstance(transfer, Mapping) and transfer.get("kv_connector"):
        yield (
            "model.save_mode and engine.options.kv_transfer_config.kv_connector do not go "
            "together: save_mode has a connector of its own. Remove one of them"
        )


def merged(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the job's options; a grammar compiler left to vLLM is not the job's own."""
    found = {**arguments, **options}
    for name, ours in arguments.items():
        if isinstance(ours, Mapping):
            given = {key: value for key, value in (options.get(name) or {}).items()}
            if name == _COMPILER and given.get("backend") == "auto":
                del given["backend"]
            found[name] = {**ours, **given}
    return found


def with_configs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings that vLLM writes into, as what it writes into. Raises ConfigError."""
    from vllm import config

    found = dict(arguments)
    for name, kind in _WRITTEN.items():
        if not isinstance(arguments.get(name), Mapping):
            continue
        try:
            found[name] = getattr(config, kind)(**arguments[name])
        except rejections() as error:
            raise ConfigError(f"engine.options.{name}: {first_line(error)}") from error
    return found
