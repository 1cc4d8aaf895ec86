"""What a model is and what will run of it on a machine, from its files and the job's settings.

`contents` has what the files say; here is what is chosen: quantization, dtype, KV cache, adapter,
and what that takes of memory. Must not know: engines, torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.config import DEFAULT_ENGINE, ModelSettings
from batchinfer.errors import ConfigError
from batchinfer.model.contents import ModelFolder, read_folder
from batchinfer.model.context import context_length
from batchinfer.model.folder import read_optional_json
from batchinfer.model.lora import Lora, check_beside, read_lora
from batchinfer.model.needs import Needs, needs_of
from batchinfer.model.shape import Shape, kv_bytes_per_token
from batchinfer.quantization import (
    RECIPES,
    Begun,
    Choice,
    Machine,
    auto_dtype,
    check_hint,
    choose,
    choose_kv_cache,
    lacks_arithmetic,
)

#: A machine of which nothing is known refuses nothing.
_ANY_MACHINE = Machine(None, engine=DEFAULT_ENGINE)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`path` and `tokenizer_path` are local folders, of a GGUF model its first file.

    `notes`, `warnings`: for the log.
    """

    path: str
    tokenizer_path: str
    dtype: str  # float32 | float16 | bfloat16
    quantization: str  # a name of the quantization table; the checkpoint's own if it has none there
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weights_bytes: int  # 0 if none were asked for
    kv_bytes_per_token: int  # an estimate: every layer with full attention
    digest: Mapping[str, str]  # file -> sha256
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    engine_quantization: str | None = None  # the engine's argument; None: as the checkpoint says
    made_by: str | None = None  # method by which a quantized checkpoint has to be made of it first
    lora: Lora | None = None
    adapters: Mapping[str, Lora] = field(default_factory=dict)  # those that rows name
    needs: Needs | None = None  # of memory; None where the weights are unknown
    shape: Shape | None = None


def read_model(
    model: ModelSettings,
    *,
    machine: Machine = _ANY_MACHINE,
    needs_weights: bool = True,
    begun: Begun | None = None,
) -> ModelFacts:
    """Facts of the job's model, as `machine` would run it.

    `begun`: what an output that is resumed was computed in, as far as the job allows it.
    Raises ConfigError.
    """
    folder = read_folder(model, needs_weights=needs_weights)
    choice, notes = _choose(model, folder, machine, begun)
    kv_cache_dtype = choose_kv_cache(
        model.kv_cache_dtype, folder.quantization_settings, machine, folder.shape.cached_size
    )
    digest = dict(folder.digest)
    if choice.made_by:
        digest["made by"] = RECIPES[choice.made_by].identity
    adapter = read_lora(model.lora, folder.weights.tensors, machine) if model.lora else None
    if adapter is not None:
        check_beside(choice.name, machine)
        digest |= adapter.digest
    adapters = {
        name: read_lora(path, folder.weights.tensors, machine, f"model.adapters.{name}")
        for name, path in model.adapters.items()
    }
    for name, found in adapters.items():
        check_beside(choice.name, machine)
        digest |= {f"adapters/{name}/{file}": value for file, value in found.digest.items()}
    kv_per_token = kv_bytes_per_token(folder.shape, choice.dtype, kv_cache_dtype)
    length = context_length(
        model.max_model_len, folder.config, folder.text, folder.tokenizer_path, notes
    )
    return ModelFacts(
        path=str(folder.path),
        tokenizer_path=str(folder.tokenizer_path),
        dtype=choice.dtype,
        quantization=choice.name,
        max_model_len=length,
        vocab_size=folder.shape.vocab_size,
        eos_token_ids=_eos_token_ids(folder.path, folder.text),
        weights_bytes=folder.weights.size_bytes,
        kv_bytes_per_token=kv_per_token,
        digest=digest,
        notes=(*notes, *choice.notes),
        warnings=choice.warnings,
        engine_quantization=choice.engine_quantization,
        made_by=choice.made_by,
        lora=adapter,
        adapters=adapters,
        needs=_needs(model, folder, choice, kv_per_token, machine),
        shape=folder.shape,
    )


def _choose(
    model: ModelSettings, folder: ModelFolder, machine: Machine, begun: Begun | None
) -> tuple[Choice, list[str]]:
    """What will run, and notes for the log on its dtype."""
    asked_dtype = _asked_dtype(model)
    auto, reason = _auto_dtype(folder, machine)
    choice = choose(
        model.quantization,
        folder.checkpoint,
        machine,
        dtype=asked_dtype or auto,
        is_dtype_asked=asked_dtype is not None,
        fallback=model.quantization_fallback,
        begun=begun,
    )
    notes = list(folder.notes)
    if reason and choice.dtype == auto and asked_dtype is None:
        notes.append(f"model.dtype auto computes in {auto}: {reason}")
    elif not folder.is_computed_as_stored and (slow := lacks_arithmetic(choice.dtype, machine)):
        notes.append(f"{choice.dtype} is slow here: {slow}")
    if model.quantization == "auto":  # the name that it asks for instead is now known to run
        check_hint(Path(model.path).name, folder.checkpoint)
    return choice, notes


def _auto_dtype(folder: ModelFolder, machine: Machine) -> tuple[str, str]:
    """As `auto_dtype`, where the folder leaves a choice."""
    if folder.is_computed_as_stored:
        return folder.checkpoint.dtype, ""
    return auto_dtype(folder.checkpoint.dtype, machine)


def _asked_dtype(model: ModelSettings) -> str | None:
    return model.resolved_dtype if model.resolved_dtype != "auto" else None


def _needs(
    model: ModelSettings, folder: ModelFolder, choice: Choice, kv_per_token: int, machine: Machine
) -> Needs | None:
    if not folder.weights.tensors:
        return None
    return needs_of(
        folder.weights.tensors,
        folder.shape,
        folder.checkpoint,
        choice,
        asked_dtype=_asked_dtype(model),
        kv_per_token=kv_per_token,
        machine=machine,
    )


def _eos_token_ids(folder: Path, text: dict[str, Any]) -> tuple[int, ...]:
    found = read_optional_json(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = text.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(
            f"{folder}: eos_token_id is {found!r} in generation_config.json or config.json, not a "
            "token id or a list of them. Copy that file again"
        )
    return tuple(ids)
