"""How large a model is: layers, heads, widths, from config.json; what its KV cache takes of them.

Must not know: weights, other files of the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization import kv_cache_record

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_NEEDED_KEYS = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the language model. With multi-head latent attention `latent_size` is not 0."""

    num_layers: int
    hidden_size: int
    intermediate_size: int  # of one token: all experts that compute it
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    latent_size: int  # one vector for all heads: what is cached of a token in a layer
    is_tied: bool  # the output layer's weights are the embedding's

    @property
    def cached_size(self) -> int:
        """Numbers in what one head (or all, if latent) keeps: what CPU kernels convert at once."""
        return self.latent_size or self.head_size


def shape_of(text: dict[str, Any]) -> Shape:
    num_heads = text["num_attention_heads"]
    hidden_size = text["hidden_size"]
    latent_size = text.get("kv_lora_rank") or 0
    if latent_size:
        latent_size += text.get("qk_rope_head_dim") or 0
    experts = text.get("num_experts_per_tok") or 0
    width = _largest(text.get("intermediate_size")) or 4 * hidden_size
    if experts and text.get("moe_intermediate_size"):
        width = max(width, experts * text["moe_intermediate_size"])
    elif experts:
        width *= experts
    return Shape(
        num_layers=text["num_hidden_layers"],
        hidden_size=hidden_size,
        intermediate_size=width,
        vocab_size=text["vocab_size"],
        num_heads=num_heads,
        num_kv_heads=_largest(text.get("num_key_value_heads")) or num_heads,
        head_size=text.get("head_dim") or hidden_size // num_heads,
        latent_size=latent_size,
        is_tied=bool(text.get("tie_word_embeddings")),
    )


def _largest(size: Any) -> int:
    """Some models have one for each layer."""
    return max(size, default=0) if isinstance(size, list) else size or 0


def kv_bytes_per_token(shape: Shape, dtype: str, kv_cache_dtype: str) -> int:
    """An estimate from above: every layer with full attention."""
    bits, scale_bytes = 8 * DTYPE_BYTES[dtype], 0
    if kv_cache_dtype != "auto":
        record = kv_cache_record(kv_cache_dtype)
        bits, scale_bytes = record.bits, record.scale_bytes
    if shape.latent_size:  # one latent vector for all heads
        return shape.num_layers * (shape.latent_size * bits // 8 + scale_bytes)
    of_head = shape.head_size * bits // 8 + scale_bytes
    return 2 * shape.num_layers * shape.num_kv_heads * of_head


def text_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The language model's settings, with its class's defaults where config.json has none."""
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config
    if all(isinstance(text.get(key), int) for key in _NEEDED_KEYS):
        return text
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        defaults = known.to_dict()
    except (ValueError, OSError, KeyError, AttributeError):  # a model that transformers lacks
        defaults = {}
    text = {**defaults, **{key: value for key, value in text.items() if value is not None}}
    missing = [key for key in _NEEDED_KEYS if not isinstance(text.get(key), int)]
    if missing:
        raise ConfigError(
            f"{folder / 'config.json'} has no {', '.join(missing)}, and transformers knows no "
            f"default for model_type {config.get('model_type')!r}: it is not a text generation "
            "model, or newer than this transformers"
        )
    return text
