"""Whether a CPU keeps coded weights packed, and decodes them in every step.

Decoded while they are loaded they take the memory of unquantized ones. So they stay packed where
the job asks for it, or where decoded they would not fit. Must not know: torch, the kernels.
"""

from __future__ import annotations

from dataclasses import replace

from batchinfer.engine.base import EngineSpec
from batchinfer.engine.hardware import Memory, gib
from batchinfer.engine.vllm.fit import estimate_of, room_of
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError
from batchinfer.quantization import METHODS, Machine, method_by_name

_KEY = "model.keep_packed"


def with_packing(
    settings: VllmSettings,
    spec: EngineSpec,
    machine: Machine,
    sizes: tuple[int, int],
    memory: Memory | None,
) -> VllmSettings:
    """The settings with what the weights will take, as `model.keep_packed` has it.

    `sizes`: max_num_seqs, max_num_batched_tokens. Raises ConfigError for a model or a device that
    it does not go with.
    """
    asked, needs = spec.job.model.keep_packed, settings.needs
    method = method_by_name(spec.model.quantization)
    if method is None or method.why_not_packed is None:
        if asked != "auto":
            names = (n.name for m in METHODS if m.why_not_packed is not None for n in m.names)
            raise ConfigError(
                f"{_KEY} is for models in {', '.join(names)}, and {settings.model_path} runs as "
                f"{spec.model.quantization}: leave it out"
            )
        return settings
    if machine.device != "cpu":
        if asked is False and machine.device is not None:
            raise ConfigError(
                f"{_KEY}: false is for a CPU, which can decode weights while they are loaded; on a "
                "GPU they stay packed: leave it out"
            )
        return settings
    if asked is False:
        return settings
    if needs is None or needs.packed is None:
        if asked == "auto":
            return settings
        reason = method.why_not_packed(machine.cpu_flags)
        if needs is None and reason is None:  # weights that the engine invents
            return replace(settings, keeps_packed=True)
        reason = reason or "its layers can only be decoded"
        return replace(settings, packing_note=f"{_KEY}: true has no effect here: {reason}")
    packed = replace(settings, keeps_packed=True, needs=replace(needs, weights=needs.packed))
    if asked is True:
        return packed
    decoded = estimate_of(settings, needs, sizes)
    if memory is None or room_of(settings, decoded, memory) >= settings.max_model_len:
        return settings
    note = (
        f"weights stay packed ({gib(needs.packed)}) and are decoded in every step, as decoded they "
        f"take {gib(needs.weights)}, and {gib(memory.free_bytes)} are free"
    )
    return replace(packed, packing_note=note)
