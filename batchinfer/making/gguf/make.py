"""Writes the GGUF file of a model's folder: a tensor at a time, read back and looked through.

Must not know: torch. Memory: the largest tensor in float32, and once more as it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.errors import ConfigError
from batchinfer.imports import import_failure
from batchinfer.making.gguf.architectures import (
    Family,
    FloatArray,
    family_of,
    num_permuted_heads,
    permuted,
    rope_factors,
    settings_of,
    tensor_name,
)
from batchinfer.making.gguf.vocabulary import VocabularyEntries, read_vocabulary
from batchinfer.making.order import LayerCounts, MakingOrder, Reporter
from batchinfer.model.folder import read_json
from batchinfer.model.shape import text_config
from batchinfer.model.weights import read_header, weight_files
from batchinfer.quantization import Tensor, read_gguf

#: The only file in the order's folder.
FILE_NAME = "model.gguf"
_Places = Mapping[str, tuple[Path, int, Tensor]]  # tensor -> file, first byte, what it is
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_ROWS = 4096  # converted together
_QUANTIZED_BLOCK = 32


def make(order: MakingOrder, reporter: Reporter) -> LayerCounts:
    """See `making.make`. Raises ConfigError for a model that is not converted."""
    source = Path(order.model.path)
    config_file = str(source / "config.json")
    config = read_json(source / "config.json", "a model folder needs it")
    text = text_config(config, source)
    family = family_of(config, config_file)
    places = _places(source)
    num_tokens = places["model.embed_tokens.weight"][2].shape[0]
    vocabulary = read_vocabulary(Path(order.model.tokenizer_path), num_tokens)
    kind = order.options["type"]
    reporter.say(f"writing {kind} in GGUF")
    target = order.target / FILE_NAME
    writer = _writer(target, family, kind)
    _add_settings(writer, settings_of(family, text, config_file), source.name)
    _add_vocabulary(writer, vocabulary)
    is_tied = bool(text.get("tie_word_embeddings"))
    tensors = {
        name: (place, tensor_name(name, str(place[0])))
        for name, place in places.items()
        if not (is_tied and name == "lm_head.weight")
    }
    tensors = {name: found for name, found in tensors.items() if found[1] is not None}
    _write(writer, tensors, family, {**text, "rope": rope_factors(text)}, kind, reporter)
    num_quantized = sum(t.dtype == "Q8_0" for t in read_gguf(target).tensors.values())
    num_linear = sum(len(place[2].shape) > 1 for place, _ in tensors.values())
    return LayerCounts(num_quantized, num_linear)


def _writer(target: Path, family: Family, kind: str) -> Any:
    try:
        import gguf
    except Exception as error:
        raise import_failure("gguf", error) from error
    writer = gguf.GGUFWriter(target, family.name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _add_settings(writer: Any, settings: Mapping[str, Any], name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    for key, value in settings.items():
        full = f"{writer.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)


def _add_vocabulary(writer: Any, found: VocabularyEntries) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    for role, token_id in found.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token_id)
    writer.add_add_bos_token(found.adds_bos)
    writer.add_add_eos_token(found.adds_eos)
    if found.adds_space_prefix is not None:
        writer.add_add_space_prefix(found.adds_space_prefix)
    templates = dict(found.chat_templates)
    if (own := templates.pop("default", None)) is not None:
        writer.add_chat_template(own)
    for name, text in sorted(templates.items()):
        writer.add_string(f"tokenizer.chat_template.{name}", text)
    if templates:  # the writer's own way has them in another order each time
        writer.add_array("tokenizer.chat_templates", sorted(templates))


def _places(source: Path) -> _Places:
    """Where each tensor is. Raises ConfigError for files that are not safetensors."""
    places: dict[str, tuple[Path, int, Tensor]] = {}
    for file in weight_files(source):
        if file.suffix != ".safetensors":
            raise ConfigError(
                f"{file} is not a safetensors file, and only those are converted: save the model "
                "with transformers' save_pretrained first"
            )
        header, tensors = read_header(file)
        offsets = {
            name: int(entry["data_offsets"][0])
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
        first = 8 + len(header)
        places |= {name: (file, first + offsets[name], t) for name, t in tensors.items()}
    return places


def _write(
    writer: Any,
    tensors: Mapping[str, tuple[tuple[Path, int, Tensor], str | None]],
    family: Family,
    text: Mapping[str, Any],
    kind: str,
    reporter: Reporter,
) -> None:
    """All tensors' names and shapes first, then one after the other."""
    import gguf

    extra: FloatArray | None = text["rope"]
    if extra is not None:
        writer.add_tensor_info(
            "rope_freqs.weight",
            extra.shape,
            extra.dtype,
            extra.nbytes,
            gguf.GGMLQuantizationType.F32,
        )
    stored = {}
    for name, ((_, _, tensor), own_name) in tensors.items():
        stored[name] = quantization = _type_of(tensor.shape, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, quantization)
        is_float = quantization in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        dtype = np.dtype(np.float32 if quantization.name == "F32" else np.float16)
        num_bytes = int(np.prod(shape))
        writer.add_tensor_info(
            own_name,
            tensor.shape if is_float else shape,
            dtype if is_float else np.dtype(np.uint8),
            num_bytes,
            quantization,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if extra is not None:
        writer.write_tensor_data(extra)
    for number, (name, (place, _)) in enumerate(tensors.items(), 1):
        heads = num_permuted_heads(name, family, text)
        writer.write_tensor_data(_converted(name, place, stored[name], heads))
        reporter.move(number / len(tensors))
    writer.close()


def _type_of(shape: tuple[int, ...], kind: str) -> Any:
    """Norms and biases stay in float32; so do rows that do not divide into blocks."""
    import gguf

    of = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return of.F32
    if kind == "q8_0" and shape[-1] % _QUANTIZED_BLOCK:
        return of.F16
    return of[kind.upper()]


def _converted(
    name: str, place: tuple[Path, int, Tensor], quantization: Any, num_heads: int
) -> npt.NDArray[Any]:
    """A tensor as it is stored. Raises ConfigError for numbers that the type does not hold."""
    import gguf

    pieces: list[npt.NDArray[Any]] = []
    for piece in _pieces(name, place, num_heads):
        if quantization.name == "F16":
            with np.errstate(over="ignore"):
                halves = piece.astype(np.float16)
            if not np.isfinite(halves).all():
                raise ConfigError(f"{name} has values beyond the range of f16: take --type bf16")
            pieces.append(halves)
        elif quantization.name == "F32":
            pieces.append(piece)
        else:
            pieces.append(gguf.quants.quantize(piece, quantization))
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _pieces(name: str, place: tuple[Path, int, Tensor], num_heads: int) -> Iterator[FloatArray]:
    """A tensor in float32, some rows at a time, those of a head together."""
    file, first, tensor = place
    whole = np.memmap(file, np.uint8, "r", first, (tensor.num_bytes,))
    rows = tensor.shape[0]
    row_bytes = tensor.num_bytes // rows
    head_rows = rows // max(1, num_heads)
    step = head_rows * max(1, _ROWS // head_rows) if num_heads else _ROWS
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        shape = (stop - start, *tensor.shape[1:])
        piece = _floats(name, whole[start * row_bytes : stop * row_bytes], tensor).reshape(shape)
        if not np.isfinite(piece).all():
            raise ConfigError(f"{name} has values that are NaN or infinite: copy the model again")
        yield permuted(piece, (stop - start) * num_heads // rows) if num_heads else piece


def _floats(name: str, content: npt.NDArray[np.uint8], tensor: Tensor) -> FloatArray:
    if tensor.dtype == "BF16":
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype in ("F32", "F16", "F64"):
        kind = {"F32": np.float32, "F16": np.float16, "F64": np.float64}[tensor.dtype]
        return content.view(kind).astype(np.float32)
    raise ConfigError(f"{name} is stored as {tensor.dtype}: give the unquantized model")
