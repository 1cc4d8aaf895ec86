"""What a model is, read from its files: context length, dtype, sizes, a digest of its content.

Must not know: engines, torch. Everything that can be wrong with the folder is said here, in a
fraction of a second, before an engine spends minutes to find it. Invariant: equal digests mean
equal weights as far as safetensors headers and sizes tell, and equal tokenizer and settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.complete import check_complete
from batchinfer.model.context import context_length
from batchinfer.model.contradictions import check_shapes
from batchinfer.model.folder import (
    content_digest,
    read_json,
    read_optional_json,
    refuse_gguf,
    require_tokenizer,
    resolve_folder,
)
from batchinfer.model.lora import Lora, check_beside, read_lora
from batchinfer.model.needs import Needs, needs_of
from batchinfer.model.shape import DTYPE_BYTES, kv_bytes_per_token, shape_of, text_config
from batchinfer.model.stored import check_stored
from batchinfer.model.weights import Weights, read_weights
from batchinfer.quantization import (
    RECIPES,
    Begun,
    Machine,
    auto_dtype,
    check_hint,
    choose,
    choose_kv_cache,
    detect,
    is_gguf,
    lacks_arithmetic,
)

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: A machine of which nothing is known refuses nothing.
_ANY_MACHINE = Machine(None)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`path` and `tokenizer_path` are local folders. `notes`, `warnings`: for the log."""

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
    engine_quantization: str | None = None  # vLLM's argument; None: as the checkpoint says
    made_by: str | None = None  # method by which a quantized checkpoint has to be made of it first
    lora: Lora | None = None
    needs: Needs | None = None  # of memory; None where the weights are unknown


def read_model(
    path: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: str = "auto",
    quantization_fallback: Sequence[str] = (),
    kv_cache_dtype: str = "auto",
    lora: str | None = None,
    machine: Machine = _ANY_MACHINE,
    max_model_len: int | None = None,
    needs_weights: bool = True,
    begun: Begun | None = None,
) -> ModelFacts:
    """Facts of the model at `path`, a folder or a hub name, as `machine` would run it.

    `begun`: what an output that is gone on with was computed in, as far as the job allows it.
    Raises ConfigError.
    """
    folder = resolve_folder(path, "model.path", revision)
    tokenizer_folder = resolve_folder(tokenizer, "model.tokenizer", None) if tokenizer else folder
    _refuse_gguf(folder)
    config = read_json(folder / "config.json", "model.path: a model folder needs it")
    notes: list[str] = []
    asked_dtype = dtype if dtype != "auto" else None
    require_tokenizer(tokenizer_folder)
    weights = read_weights(folder) if needs_weights else Weights()
    text = text_config(config, folder)
    shape = shape_of(text)
    check_complete(weights, text, folder)
    settings, file = _quantization_settings(config, text, folder)
    has_experts = any(".experts." in name for name in weights.tensors)
    own_dtype = _own_dtype(config, text, weights)
    checkpoint = replace(detect(settings, str(file)), has_experts=has_experts, dtype=own_dtype)
    check_stored(checkpoint, settings, weights, folder)
    check_shapes(weights.tensors, config, folder)
    auto, reason = auto_dtype(own_dtype, machine)
    chosen = choose(
        quantization,
        checkpoint,
        machine,
        dtype=asked_dtype or auto,
        is_dtype_asked=asked_dtype is not None,
        fallback=quantization_fallback,
        begun=begun,
    )
    if reason and chosen.dtype == auto and asked_dtype is None:
        notes.append(f"model.dtype auto computes in {auto}: {reason}")
    elif slow := lacks_arithmetic(chosen.dtype, machine):
        notes.append(f"{chosen.dtype} is slow here: {slow}")
    if quantization == "auto":  # the name that it asks for instead is now known to run
        check_hint(Path(path).name, checkpoint)
    kv_cache_dtype = choose_kv_cache(kv_cache_dtype, settings, machine, shape.cached_size)
    digest = content_digest(folder, tokenizer_folder)
    if weights.sha256:
        digest["weights"] = weights.sha256
    if chosen.made_by:
        digest["made by"] = RECIPES[chosen.made_by].identity
    adapter = read_lora(lora, weights.tensors) if lora else None
    if adapter is not None:
        check_beside(chosen.name, machine)
        digest |= adapter.digest
    kv_per_token = kv_bytes_per_token(shape, chosen.dtype, kv_cache_dtype)
    needs = None
    if weights.tensors:
        needs = needs_of(
            weights.tensors,
            shape,
            name=chosen.name,
            checkpoint=checkpoint,
            dtype=chosen.dtype,
            asked_dtype=asked_dtype,
            kv_per_token=kv_per_token,
            machine=machine,
        )
    return ModelFacts(
        path=str(folder),
        tokenizer_path=str(tokenizer_folder),
        dtype=chosen.dtype,
        quantization=chosen.name,
        max_model_len=context_length(max_model_len, config, text, tokenizer_folder, notes),
        vocab_size=shape.vocab_size,
        eos_token_ids=_eos_token_ids(folder, text),
        weights_bytes=weights.size_bytes,
        kv_bytes_per_token=kv_per_token,
        digest=digest,
        notes=(*notes, *chosen.notes),
        warnings=chosen.warnings,
        engine_quantization=chosen.engine_quantization,
        made_by=chosen.made_by,
        lora=adapter,
        needs=needs,
    )


def _own_dtype(config: dict[str, Any], text: dict[str, Any], weights: Weights) -> str:
    """The checkpoint's: what it says, else what most of its numbers are."""
    named = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")
    stored = max(weights.dtypes, key=lambda name: weights.dtypes[name], default="")
    found = str(named).removeprefix("torch.") if named else _SAFETENSORS_DTYPES.get(stored)
    return found if found in DTYPE_BYTES else "bfloat16"


def _quantization_settings(
    config: dict[str, Any], text: dict[str, Any], folder: Path
) -> tuple[dict[str, Any] | None, Path]:
    """The settings of the checkpoint's family, wherever it writes them, and the file."""
    file = folder / "config.json"
    settings = next(
        (
            source[key]
            for source in (config, text)
            for key in ("quantization_config", "compression_config")
            if isinstance(source.get(key), dict)
        ),
        None,
    )
    if settings is None:
        file = folder / "hf_quant_config.json"
        settings = read_optional_json(file).get("quantization")
        if not isinstance(settings, dict | None):
            raise ConfigError(
                f"{file}: quantization is {settings!r}, not an object of settings: copy it again"
            )
    if settings is None and (file := folder / "quantize_config.json").exists():
        raise ConfigError(
            f"{file} says how the model is quantized, but config.json does not: put its content "
            'there as quantization_config, with "quant_method": "gptq"'
        )
    return settings, file


def _refuse_gguf(folder: Path) -> None:
    """A folder of GGUF files often has no config.json: say what it is, not what it lacks."""
    files = sorted(folder.glob("*.gguf"))
    if files and not any(folder.glob("*.safetensors")) and is_gguf(files[0]):
        refuse_gguf(files[0])


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
