"""LoRA adapters of the demo model, as PEFT writes them, with random or zero updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, WIDTH, NUM_LAYERS = 256, 1024, 6
MODULES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, WIDTH)}  # [out, in]


def write_adapter(
    folder: Path, *, scale: float, rank: int = 12, num_layers: int = NUM_LAYERS, **settings: Any
) -> Path:
    """An adapter of two modules of each layer; `scale` 0 makes every B zero. Returns the folder."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(num_layers):
        for module, (num_out, num_in) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = random.standard_normal((rank, num_in)) / num_in**0.5
            b = random.standard_normal((num_out, rank)) * scale
            tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
