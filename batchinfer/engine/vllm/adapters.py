"""Which LoRA adapters vLLM runs.

Must not know: folders, models, vLLM's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: Adapters of which a step may have rows: each has its memory on the device.
MAX_LORAS = 8

#: PEFT's ways to begin training that leave the model's own weights as they are.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def why_no_adapter(config: Mapping[str, Any]) -> str | None:
    """All but plain LoRA on linear layers and embeddings is refused."""
    kind = str(config.get("peft_type", "LORA"))
    if kind.upper() != "LORA":
        return f"peft_type {kind} is not a LoRA adapter, the only kind that vLLM runs"
    start = config.get("init_lora_weights", True)
    refused = {
        "use_dora": bool(config.get("use_dora")),
        "bias": config.get("bias", "none") != "none",
        "lora_bias": bool(config.get("lora_bias")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "layer_replication": bool(config.get("layer_replication")),
        "alora_invocation_tokens": bool(config.get("alora_invocation_tokens")),
        "init_lora_weights": isinstance(start, str) and start.lower() not in _PLAIN_STARTS,
    }
    key = next((key for key, is_refused in refused.items() if is_refused), None)
    if key is None:
        return None
    return (
        f"vLLM cannot run an adapter with {key} {config[key]!r}: merge it into the model's weights "
        "(PEFT's merge_and_unload) and give that model"
    )
