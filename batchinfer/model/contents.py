"""What a model folder's files say, on whatever machine: nothing here is chosen.

Must not know: engines, machines, torch. Everything that can be wrong with the folder is said here,
in a fraction of a second, before an engine spends minutes to find it. Invariant: equal digests mean
equal weights as far as safetensors headers and sizes show, and equal tokenizer and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchinfer.config import ModelSettings
from batchinfer.model.complete import check_complete
from batchinfer.model.contradictions import check_shapes
from batchinfer.model.folder import (
    content_digest,
    read_json,
    require_tokenizer,
    resolve_folder,
)
from batchinfer.model.gguf import (
    find_gguf,
    gguf_checkpoint,
    gguf_digest,
    gguf_weights,
    read_gguf_settings,
    types_of,
)
from batchinfer.model.quantized import quantization_settings
from batchinfer.model.shape import DTYPE_BYTES, Shape, shape_of, text_config
from batchinfer.model.stored import check_stored
from batchinfer.model.weights import Weights, read_weights
from batchinfer.quantization import Checkpoint, detect

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """`path` and `tokenizer_path` are local folders; of a GGUF model its first file."""

    path: Path
    tokenizer_path: Path
    config: dict[str, Any]  # config.json
    text: dict[str, Any]  # settings of the language model, with its class's defaults
    shape: Shape
    weights: Weights  # empty if none were asked for
    checkpoint: Checkpoint
    quantization_settings: Mapping[str, Any] | None  # of the checkpoint's family
    digest: Mapping[str, str]  # file -> sha256
    is_computed_as_stored: bool = False  # in the types of the file, whatever a machine is fast in
    notes: tuple[str, ...] = ()  # for the log


def read_folder(model: ModelSettings, *, needs_weights: bool = True) -> ModelFolder:
    """The files of `model.path` and `model.tokenizer`, each a folder or a hub name, checked.

    Raises ConfigError.
    """
    folder = resolve_folder(model.path, "model.path", model.revision)
    tokenizer_folder = folder
    if model.tokenizer:
        tokenizer_folder = resolve_folder(model.tokenizer, "model.tokenizer", None)
    if (file := find_gguf(folder)) is not None:
        return _read_gguf(file, file if tokenizer_folder == folder else tokenizer_folder)
    config = read_json(folder / "config.json", "model.path: a model folder needs it")
    require_tokenizer(tokenizer_folder)
    weights = read_weights(folder) if needs_weights else Weights()
    text = text_config(config, folder)
    shape = shape_of(text)
    check_complete(weights, text, folder)
    settings, file = quantization_settings(config, text, folder)
    checkpoint = replace(
        detect(settings, str(file)),
        has_experts=any(".experts." in name for name in weights.tensors),
        dtype=_own_dtype(config, text, weights),
    )
    alone = None if isinstance(config.get("text_config"), dict) else text
    check_stored(checkpoint, settings, weights, folder, alone)
    check_shapes(weights.tensors, config, folder)
    digest = content_digest(folder, tokenizer_folder)
    if weights.sha256:
        digest["weights"] = weights.sha256
    return ModelFolder(
        path=folder,
        tokenizer_path=tokenizer_folder,
        config=config,
        text=text,
        shape=shape,
        weights=weights,
        checkpoint=checkpoint,
        quantization_settings=settings,
        digest=digest,
    )


def _read_gguf(file: Path, tokenizer: Path) -> ModelFolder:
    """The same of a GGUF file, whose header is all that there is to read."""
    parts, text = read_gguf_settings(file)
    weights = gguf_weights(parts)
    return ModelFolder(
        path=file,
        tokenizer_path=tokenizer,
        config=text,
        text=text,
        shape=shape_of(text),
        weights=weights,
        checkpoint=gguf_checkpoint(weights),
        quantization_settings=None,
        digest={**gguf_digest(parts, tokenizer), "weights": weights.sha256},
        is_computed_as_stored=True,
        notes=(f"the file's weights are {types_of(weights)}",),
    )


def _own_dtype(config: dict[str, Any], text: dict[str, Any], weights: Weights) -> str:
    """The checkpoint's: what it says, else what most of its numbers are."""
    named = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")
    stored = max(weights.dtypes, key=lambda name: weights.dtypes[name], default="")
    found = str(named).removeprefix("torch.") if named else _SAFETENSORS_DTYPES.get(stored)
    return found if found in DTYPE_BYTES else "bfloat16"
