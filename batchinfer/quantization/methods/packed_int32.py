"""Layouts of weights that are packed into 32-bit integers: AWQ's and GPTQ's.

Both give their tensors the same names, and only shapes distinguish them. Must not know: which of
them the settings say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from batchinfer.errors import ConfigError
from batchinfer.quantization.methods.base import (
    Settings,
    Stored,
    Tensor,
    check_packed,
    count_weights,
)

_GEMV = "AWQ's GEMV version"

#: Last parts of the names of tensors, beside `scales`; see `Method.weight_parts`.
PARTS = ("qweight.*", "qzeros", "(.*_)?scales", "g_idx")


def check_layout(stored: Stored, wanted: str, bits: int) -> None:
    """Raise ConfigError for tensors in another layout than `wanted`, or with other bits."""
    check_packed(stored)
    # GPTQModel's rules for single layers, of which some may have other bits.
    is_one_width = not stored.settings.get("dynamic")
    for name, packed in stored.tensors.items():
        stem, _, part = name.rpartition(".")
        scales = stored.tensors.get(f"{stem}.scales")
        if part != "qweight" or scales is None or not len(packed.shape) == len(scales.shape) == 2:
            continue
        layout = _layout(packed, scales)
        if layout == _GEMV:
            raise ConfigError(
                f"{stored.folder}: {name} {list(packed.shape)} is in the layout of {_GEMV}, which "
                "vLLM does not read: give a checkpoint of its GEMM version"
            )
        actual = f"is in the layout of {layout}"
        is_right = layout in (None, wanted)
        inputs = stored.tensors.get(f"{stem}.g_idx")  # GPTQ has the group of each
        if is_right and is_one_width and inputs is not None and len(inputs.shape) == 1:
            num_bits = 32 * packed.shape[0] / inputs.shape[0]
            is_right = num_bits == bits
            actual = f"has {num_bits:g} bits for each of {inputs.shape[0]} inputs"
        if not is_right:
            raise stored.contradiction(
                f"{stored.words}, but {name} {list(packed.shape)} beside scales "
                f"{list(scales.shape)} {actual}"
            )


def count_packed(settings: Settings, module: str, parts: Mapping[str, Tensor]) -> int:
    """See `Method.count_weights`: as many as the settings' bits say, or the groups of inputs."""
    weights = count_weights(settings, module, parts)
    packed, inputs = parts.get("qweight"), parts.get("g_idx")
    if packed is None:
        return weights
    if inputs is not None and len(inputs.shape) == 1 and packed.shape[0] != inputs.shape[0]:
        return weights + inputs.shape[0] * packed.shape[1]  # GPTQ; single layers may differ in bits
    return weights + math.prod(packed.shape) * 32 // int(settings.get("bits") or settings["w_bit"])


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
