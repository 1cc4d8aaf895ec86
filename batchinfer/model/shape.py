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
_NEEDED_KEYS = ("vocab_size", "num_hidden_layers", "hidden_size")
_HEADS = "num_attention_heads"  # not there without attention
#: Those that other sizes stand in for. Some models have one for each layer.
_OTHER_KEYS = (
    _HEADS,
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "kv_lora_rank",
    "qk_rope_head_dim",
)


#: Where any of these is there, some layers keep a window of tokens, a state, or another layer's.
_KEYS_OF_LESS_CACHE = (
    "attention_chunk_size",
    "attn_layer_period",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_num_key_heads",
    "mamba_d_state",
    "num_kv_shared_layers",
    "state_size",
)


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
    caches_all_tokens: bool = False  # every layer keeps every token of a sequence, for certain

    @property
    def cached_size(self) -> int:
        """Numbers in what one head (or all, if latent) keeps: what CPU kernels convert at once."""
        return self.latent_size or self.head_size


def shape_of(text: dict[str, Any]) -> Shape:
    """`text` as `text_config` gives it. A model without attention is counted as with one head."""
    hidden_size = text["hidden_size"]
    sizes = {key: _largest(text.get(key)) for key in _OTHER_KEYS}
    num_heads = sizes[_HEADS] or 1
    latent_size = sizes["kv_lora_rank"]
    if latent_size:
        latent_size += sizes["qk_rope_head_dim"]
    experts = sizes["num_experts_per_tok"]
    width = sizes["intermediate_size"] or 4 * hidden_size
    if experts and sizes["moe_intermediate_size"]:
        width = max(width, experts * sizes["moe_intermediate_size"])
    elif experts:
        width *= experts
    return Shape(
        num_layers=text["num_hidden_layers"],
        hidden_size=hidden_size,
        intermediate_size=width,
        vocab_size=text["vocab_size"],
        num_heads=num_heads,
        num_kv_heads=sizes["num_key_value_heads"] or num_heads,
        head_size=sizes["head_dim"] or hidden_size // num_heads,
        latent_size=latent_size,
        is_tied=bool(text.get("tie_word_embeddings")),
        caches_all_tokens=_caches_all_tokens(text),
    )


def _caches_all_tokens(text: dict[str, Any]) -> bool:
    if not text.get(_HEADS) or any(text.get(key) for key in _KEYS_OF_LESS_CACHE):
        return False
    if text.get("sliding_window") and text.get("use_sliding_window") is not False:
        return False
    kinds = text.get("layer_types") or []
    return all(kind == "full_attention" for kind in kinds)


def _largest(size: Any) -> int:
    return max(size, default=0) if isinstance(size, list) else size or 0


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
    _check_sizes(text, folder)
    if all(text.get(key) for key in (*_NEEDED_KEYS, _HEADS)):
        return text
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    lacks = (ValueError, OSError, KeyError, AttributeError, StrictDataclassError)
    try:
        known = AutoConfig.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # without it, it asks on the terminal for 15 s
        )
        of_text = known.get_text_config()
        # Some classes have names of their own for sizes (n_embd, d_model), and answer to these too.
        sizes = {key: getattr(of_text, key, None) for key in (*_NEEDED_KEYS, *_OTHER_KEYS)}
        defaults = of_text.to_dict() | {k: v for k, v in sizes.items() if v is not None}
    except lacks:  # a model that transformers does not know
        defaults = {}
    text = {**defaults, **{key: value for key, value in text.items() if value is not None}}
    _check_sizes(text, folder)
    missing = [key for key in _NEEDED_KEYS if not text.get(key)]
    if missing:
        raise ConfigError(
            f"{folder / 'config.json'} has no {', '.join(missing)}, and transformers knows no "
            f"default for model_type {config.get('model_type')!r}: it is not a text generation "
            "model, or newer than this transformers"
        )
    return text


def _check_sizes(text: dict[str, Any], folder: Path) -> None:
    """Refuse impossible sizes among the keys that are there; 0 stands for what a model lacks."""
    for key in (*_NEEDED_KEYS, *_OTHER_KEYS):
        value, is_needed = text.get(key), key in (*_NEEDED_KEYS, _HEADS)
        sizes = value if isinstance(value, list) and not is_needed else [value]
        if value is not None and not all(_is_size(size, least=int(is_needed)) for size in sizes):
            raise ConfigError(
                f"{folder / 'config.json'}: {key} is {value!r}, not a whole number: copy it again"
            )
