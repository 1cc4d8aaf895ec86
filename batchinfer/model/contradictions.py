"""Tensors whose shapes contradict config.json: what vLLM would find while it loads, or never.

Only what is certain. Sizes are compared under the names that most models have, where config.json is
of a language model alone and has one number for each; all others are left to vLLM. Must not know:
engines, machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.weights import Tensor
from batchinfer.quantization import Checkpoint

_FLOATS = ("F32", "F16", "BF16")
#: Scheme -> layout, and bits of a weight. Both formats pack weights into 32-bit integers.
_LAYOUTS = {"awq": ("AWQ", 4), "gptq": ("GPTQ", 4), "gptq-8bit": ("GPTQ", 8)}
_GEMV = "AWQ's GEMV version"


def check_shapes(
    tensors: Mapping[str, Tensor], checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path
) -> None:
    """Raise ConfigError if tensors cannot be of a model with these settings."""
    if checkpoint.scheme in _LAYOUTS:
        settings = config.get("quantization_config")
        # GPTQModel's rules for single layers, of which some may have other bits.
        has_rules = isinstance(settings, dict) and bool(settings.get("dynamic"))
        _check_layout(tensors, checkpoint, folder, is_one_width=not has_rules)
    for name, shape, keys in _expected(config):
        found = tensors.get(name)
        if found is not None and found.dtype in _FLOATS and found.shape != shape:
            raise ConfigError(
                f"{folder}: {name} is {list(found.shape)}, but config.json says {list(shape)} "
                f"({keys}): they are not of one model, copy it again"
            )


def _check_layout(
    tensors: Mapping[str, Tensor], checkpoint: Checkpoint, folder: Path, *, is_one_width: bool
) -> None:
    """AWQ and GPTQ give their tensors the same names."""
    wanted, bits = _LAYOUTS[checkpoint.scheme]
    for name, packed in tensors.items():
        stem, _, part = name.rpartition(".")
        scales = tensors.get(f"{stem}.scales")
        if part != "qweight" or scales is None or not len(packed.shape) == len(scales.shape) == 2:
            continue
        layout = _layout(packed, scales)
        if layout == _GEMV:
            raise ConfigError(
                f"{folder}: {name} {list(packed.shape)} is in the layout of {_GEMV}, which vLLM "
                "does not read: give a checkpoint of its GEMM version"
            )
        found = f"is in the layout of {layout}"
        is_right = layout in (None, wanted)
        inputs = tensors.get(f"{stem}.g_idx")  # GPTQ has the group of each
        if is_right and is_one_width and inputs is not None and len(inputs.shape) == 1:
            num_bits = 32 * packed.shape[0] / inputs.shape[0]
            is_right = num_bits == bits
            found = f"has {num_bits:g} bits for each of {inputs.shape[0]} inputs"
        if not is_right:
            raise ConfigError(
                f"{folder}: its settings say {checkpoint.words}, but {name} {list(packed.shape)} "
                f"beside scales {list(scales.shape)} {found}: config.json and the weights are not "
                "of one checkpoint, copy it again"
            )


def _layout(packed: Tensor, scales: Tensor) -> str | None:
    """By which of the two sizes is packed; None if it is neither's."""
    rows, columns = packed.shape
    num_groups, num_out = scales.shape
    if columns == num_out:  # [in / 8, out], scales [groups, out]
        return "GPTQ"
    if num_out == 8 * columns:  # [in, out / 8], scales [groups, out]
        return "AWQ"
    if rows == num_groups:  # [out, in / 8], scales [out, groups]
        return _GEMV
    return None


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(tensor, its shape, the keys that say so)"""
    hidden, vocabulary, width = (
        config.get(key) for key in ("hidden_size", "vocab_size", "intermediate_size")
    )
    if any(isinstance(value, dict) and "hidden_size" in value for value in config.values()):
        return  # of several models
    if not isinstance(hidden, int):
        return
    yield "model.layers.0.input_layernorm.weight", (hidden,), "hidden_size"
    if isinstance(vocabulary, int):
        shape = (vocabulary, hidden)
        yield "model.embed_tokens.weight", shape, "vocab_size, hidden_size"
    if isinstance(width, int):
        shape = (hidden, width)
        yield "model.layers.0.mlp.down_proj.weight", shape, "hidden_size, intermediate_size"
