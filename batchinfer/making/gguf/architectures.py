"""The families that are converted: what llama.cpp calls their settings and tensors.

Must not know: files, how a tensor is stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.errors import ConfigError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Family:
    name: str  # llama.cpp's architecture
    permutes: (
        bool  # whether it turns pairs of neighbours in a head, where transformers turns halves
    )


#: `architectures` of config.json -> the family.
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", permutes=True),
    "MistralForCausalLM": Family("llama", permutes=True),
    "Qwen2ForCausalLM": Family("qwen2", permutes=False),
    "Qwen3ForCausalLM": Family("qwen3", permutes=False),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
#: Buffers that older models store; llama.cpp computes them.
_LEFT_OUT = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)")


def family_of(config: Mapping[str, Any], file: str) -> Family:
    """Raises ConfigError for another family, or for what llama.cpp computes otherwise."""
    named = (config.get("architectures") or ["none"])[0]
    if named not in FAMILIES:
        raise ConfigError(
            f"{file}: {named} is not converted to GGUF here (those are {', '.join(FAMILIES)}): "
            "llama.cpp's convert_hf_to_gguf.py knows more"
        )
    for key in ("attention_multiplier", "embedding_multiplier", "residual_multiplier"):
        if config.get(key):
            raise ConfigError(f"{file}: GGUF of this family cannot express {key}")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"{file}: partial_rotary_factor is not converted to GGUF here")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{file}: hidden_act {activation} is not converted to GGUF here")
    return FAMILIES[named]


def tensor_name(name: str, file: str) -> str | None:
    """llama.cpp's name of a tensor; None: it has none. Raises ConfigError for an unknown tensor."""
    if name in _OTHERS:
        return _OTHERS[name]
    if _LEFT_OUT.fullmatch(name):
        return None
    if (match := _LAYER.fullmatch(name)) and match[2] in _MODULES:
        return f"blk.{match[1]}.{_MODULES[match[2]]}.{match[3]}"
    raise ConfigError(f"{file}: the tensor {name} is not converted to GGUF here")


def num_permuted_heads(name: str, family: Family, config: Mapping[str, Any]) -> int:
    """Heads whose rows change places in a tensor of transformers' `name`; 0: none do."""
    if not family.permutes:
        return 0
    num_heads = int(config["num_attention_heads"])
    if ".q_proj." in name:
        return num_heads
    return int(config.get("num_key_value_heads") or num_heads) if ".k_proj." in name else 0


def permuted(weight: FloatArray, num_heads: int) -> FloatArray:
    """Halves of each head's rows, one from each by turns: [rows, ...] -> [rows, ...]"""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def settings_of(family: Family, text: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The metadata of the architecture, without its prefix. `text`: config.json, with defaults.

    Raises ConfigError for a kind of rope that is not converted.
    """
    num_heads = int(text["num_attention_heads"])
    head_size = int(text.get("head_dim") or text["hidden_size"] // num_heads)
    rope = _rope_of(text)
    length = int(text["max_position_embeddings"])
    window = text.get("sliding_window")
    if window and text.get("use_sliding_window") is not False:
        length = min(length, int(window))  # beyond it llama.cpp would attend to more
    return {
        "context_length": length,
        "embedding_length": int(text["hidden_size"]),
        "block_count": int(text["num_hidden_layers"]),
        "feed_forward_length": int(text["intermediate_size"]),
        "attention.head_count": num_heads,
        "attention.head_count_kv": int(text.get("num_key_value_heads") or num_heads),
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": float(text.get("rms_norm_eps") or 1e-6),
        "rope.dimension_count": head_size,
        "rope.freq_base": float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        "vocab_size": int(text["vocab_size"]),
        **_scaling(rope, length, file),
    }


def _rope_of(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _scaling(rope: Mapping[str, Any], length: int, file: str) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "llama3", None):  # the latter is a tensor
        return {}
    if kind in ("linear", "yarn"):
        found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            original = int(rope.get("original_max_position_embeddings") or length)
            found["rope.scaling.original_context_length"] = original
        return found
    raise ConfigError(f"{file}: rope of type {kind} is not converted to GGUF here")


def rope_factors(text: Mapping[str, Any]) -> FloatArray | None:
    """What divides each frequency of llama3's rope: [head size / 2]. None: another rope."""
    rope = _rope_of(text)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    head_size = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    base = float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0)
    factor, low, high = (
        float(rope.get(key, default))
        for key, default in (("factor", 8), ("low_freq_factor", 1), ("high_freq_factor", 4))
    )
    original = float(rope.get("original_max_position_embeddings") or 8192)
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_size, 2) / head_size)
    share = ((original / wavelengths - low) / (high - low)).clip(0, 1)
    factors: FloatArray = (1 / ((1 - share) / factor + share)).astype(np.float32)
    return factors
