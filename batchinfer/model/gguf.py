"""What a GGUF file says of its model, in the words of a model folder.

Invariant: equal digests mean equal metadata, tensors of the same types and shapes, and the same
tokenizer. Must not know: engines, weights' values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.folder import content_digest, require_tokenizer
from batchinfer.model.weights import Weights
from batchinfer.quantization import Checkpoint, GgufFile, gguf_models, parts_of, read_gguf

#: Types of weights as a dtype; what is packed is computed from float32 blocks.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Key in the metadata, after the architecture -> config.json's.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.kv_lora_rank": "kv_lora_rank",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "ssm.state_size": "state_size",
}
_NEEDED = ("context_length", "embedding_length", "block_count")
#: Architectures that read a whole text before they write, or write none.
_ENCODERS = frozenset({"t5", "t5encoder", "bert", "nomic-bert", "jina-bert-v2", "modern-bert"})
_NO_MODELS = {"adapter": "a LoRA adapter", "mmproj": "the part of a model that sees images"}


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only model in a folder; None: neither.

    Raises ConfigError for a folder with several.
    """
    if path.is_file():
        return path
    if (path / "config.json").exists() or any(path.glob("*.safetensors")):
        return None
    models = gguf_models(path)
    if len(models) > 1:
        names = ", ".join(file.name for file in models[:3])
        raise ConfigError(f"{path} has {len(models)} GGUF models ({names}, …): name one of them")
    return models[0] if models else None


def read_gguf_settings(file: Path) -> tuple[list[GgufFile], dict[str, Any]]:
    """The files of a model, and what config.json would say of it. Raises ConfigError."""
    parts = [read_gguf(part) for part in parts_of(file)]
    first = parts[0].metadata
    _check_parts(parts)
    kind = str(first.get("general.type", "model"))
    architecture = str(first.get("general.architecture", ""))
    if kind in _NO_MODELS or architecture == "clip":
        what = _NO_MODELS.get(kind, _NO_MODELS["mmproj"])
        raise ConfigError(f"{file} is {what}, not a language model: give the model's own file")
    if architecture in _ENCODERS or first.get(f"{architecture}.attention.causal") is False:
        raise ConfigError(
            f"{file} is a model of {architecture}, which generates no text from left to right: "
            "take a file of another model"
        )
    if missing := [k for k in _NEEDED if not _is_size(first.get(f"{architecture}.{k}"))]:
        raise ConfigError(
            f"{file} does not say its {', '.join(missing)} ({architecture or 'no architecture'}): "
            "it is not a language model, or damaged; take another file"
        )
    text: dict[str, Any] = {"model_type": architecture, "is_gguf": True}
    for key, name in _KEYS.items():
        if (value := first.get(f"{architecture}.{key}")) is not None:
            text[name] = list(value) if isinstance(value, tuple) else value
    text["vocab_size"] = _num_tokens(first, architecture, file)
    ends = (first.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    text["eos_token_id"] = [end for end in ends if isinstance(end, int)]
    heads = text.get("num_attention_heads")
    text["num_attention_heads"] = max(heads) if isinstance(heads, list) else heads or 1
    text["tie_word_embeddings"] = not any("output.weight" in part.tensors for part in parts)
    return parts, text


def gguf_weights(parts: list[GgufFile]) -> Weights:
    weights = Weights()
    digest = hashlib.sha256()
    for part in parts:
        size_bytes = part.path.stat().st_size
        weights.size_bytes += size_bytes
        weights.tensors |= part.tensors
        weights.file_names |= dict.fromkeys(part.tensors, part.path.name)
        for tensor in part.tensors.values():
            held = weights.dtypes.get(tensor.dtype, 0)
            weights.dtypes[tensor.dtype] = held + tensor.num_bytes
        digest.update(f"{size_bytes}\0{part.header_sha256}\n".encode())
    weights.sha256 = digest.hexdigest()
    return weights


def gguf_checkpoint(weights: Weights) -> Checkpoint:
    most = max(weights.dtypes, key=lambda name: weights.dtypes[name], default="F32")
    return Checkpoint(
        "gguf",
        "",
        has_experts=any("_exps." in name for name in weights.tensors),
        dtype=_DTYPES.get(most, "float32"),
    )


def gguf_digest(parts: list[GgufFile], tokenizer: Path) -> dict[str, str]:
    """Of the tokenizer in the file, or of the folder's that is taken instead."""
    if tokenizer == parts[0].path:
        return {"tokenizer.gguf": parts[0].tokenizer_sha256}
    require_tokenizer(tokenizer)
    return content_digest(tokenizer, tokenizer)


def types_of(weights: Weights) -> str:
    """For people: the types that weights are in, those of most bytes first."""
    ordered = sorted(weights.dtypes, key=lambda name: -weights.dtypes[name])
    return ", ".join(ordered)


def _check_parts(parts: list[GgufFile]) -> None:
    first = parts[0]
    said = first.metadata.get("split.count", 1)
    if said not in (0, len(parts)):
        raise ConfigError(
            f"{first.path} says that its model is in {said} files, and its name that it is in "
            f"{len(parts)}: give them the names that they were made with (NAME-00001-of-00003.gguf)"
        )
    if len(parts) == 1:
        return
    numbers = [part.metadata.get("split.no") for part in parts]
    num_tensors = sum(len(part.tensors) for part in parts)
    said_tensors = first.metadata.get("split.tensors.count", num_tensors)
    if numbers != list(range(len(parts))) or num_tensors != said_tensors:
        raise ConfigError(
            f"{first.path} and the files after it are not of one model, or one of them is another "
            "than its name says: copy them again"
        )


def _num_tokens(metadata: Mapping[str, Any], architecture: str, file: Path) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = getattr(tokens, "num", 0) or metadata.get(f"{architecture}.vocab_size")
    if not _is_size(count):
        raise ConfigError(f"{file} has no vocabulary: take another file of the model")
    return int(count)  # type: ignore[arg-type]


def _is_size(value: Any) -> bool:
    sizes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(size, int) and not isinstance(size, bool) for size in sizes) and (
        max(sizes, default=0) > 0
    )
