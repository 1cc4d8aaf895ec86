"""Which tensors of a model are the weights of linear layers that may be quantized.

Names alone do not show it: an embedding and GPT-2's transposed layers look the same. transformers
builds the model without memory (on the device "meta") and says what each module is. Heads and
routers stay as they are: they are small and decide much. Must not know: how weights are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from batchinfer.errors import ConfigError

#: Modules of mixtures of experts that choose the experts.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
#: Tensors of all experts of a layer: `experts.gate_up_proj`, `block_sparse_moe.input_linear`.
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
#: transformers keeps the experts of a layer in one module; files have a linear layer for each.
_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")
#: Layers that vLLM computes as one, on the same inputs.
_COMPUTED_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def linear_layers(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[set[str], set[str]]:
    """Names of the layers to quantize, and of linear layers that stay as they are.

    `shapes` of all tensors, by name. Raises ConfigError if it cannot be determined.
    """
    if fused := [n for n, shape in shapes.items() if len(shape) == 3 and _EXPERTS.search(n)]:
        raise ConfigError(
            f"{folder} keeps the experts of a layer in one tensor ({fused[0]}), which is not "
            "quantized here: give a checkpoint that is already quantized"
        )
    known, heads = _modules(folder)
    found, kept = set(), set(heads)
    for tensor, shape in shapes.items():
        layer, _, part = tensor.rpartition(".")
        if part != "weight" or len(shape) != 2:
            continue
        if layer in heads or layer.rpartition(".")[2] in _ROUTERS:
            kept.add(layer)
        elif layer in known or _EXPERT.search(layer):
            found.add(layer)
    if not found:
        raise ConfigError(
            f"{folder} has no linear layer under a name that transformers gives it: it cannot be "
            "quantized here"
        )
    return found, kept


def computed_together(layer: str, layers: set[str]) -> list[str]:
    """The layers that vLLM computes as one with `layer`, itself among them."""
    parent, dot, name = layer.rpartition(".")
    for names in _COMPUTED_TOGETHER:
        if name in names:
            return [other for n in names if (other := f"{parent}{dot}{n}") in layers]
    return [layer]


def _modules(folder: Path) -> tuple[set[str], set[str]]:
    """Names of all linear modules, and of those among them that make logits of hidden states."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    lacks = (ValueError, OSError, KeyError, ImportError, AttributeError, StrictDataclassError)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except lacks as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{folder} cannot be quantized here: transformers does not build it as a text "
            f"generation model ({reason})"
        ) from error
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return set(linear), {name for name, module in linear.items() if module is head}
