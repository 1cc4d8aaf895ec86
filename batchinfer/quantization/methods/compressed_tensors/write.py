"""A linear layer's weight, rounded to the nearest values of a scheme, as its checkpoint holds it.

compressed-tensors packs; here are only the scales. They are computed in float32 and rounded to the
type they are stored in first, so that each weight is rounded for the scale that it will be
multiplied by. Must not know: files, models. Memory: the weight, what it becomes, and some copies
of `_SLAB_ROWS` rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

#: A multiple of the blocks' 128 rows. Packing 4-bit floats takes 20 times the memory of its input.
_SLAB_ROWS = 1024


def round_weight(weight: Tensor, preset: str, largest: float | None = None) -> dict[str, Tensor]:
    """Tensors for a `weight` [out, in] float, by the last part of their names.

    `largest`: the greatest absolute value of the layers that vLLM computes as one with this one,
    which share a scale; only schemes with a scale for the whole tensor need it.
    """
    scheme, compressor = _scheme(preset)
    shared: dict[str, Tensor] = {}
    if scheme.weights.strategy == "tensor_group":
        from compressed_tensors.quantization.utils import generate_gparam

        assert largest is not None
        value = torch.tensor([largest], dtype=torch.float32, device=weight.device)
        shared["weight_global_scale"] = generate_gparam(-value, value)
    slabs = [
        _round_rows(rows.float(), weight.dtype, scheme, compressor, shared)
        for rows in weight.split(_SLAB_ROWS)
    ]
    packed = {
        name: torch.cat([slab[name] for slab in slabs]) for name in slabs[0] if name not in shared
    }
    if "weight_shape" in packed:
        packed["weight_shape"] = torch.tensor(weight.shape)
    return packed | shared


def uses_shared_scale(preset: str) -> bool:
    """Whether `round_weight` needs `largest`."""
    return bool(_scheme(preset)[0].weights.strategy == "tensor_group")


def group_size_of(preset: str) -> int | None:
    """Neighbouring inputs that share a scale; a layer's inputs have to be a multiple of it."""
    size: int | None = _scheme(preset)[0].weights.group_size
    return size


def settings_of(preset: str, ignored: list[str]) -> dict[str, Any]:
    """What config.json has to say, as `quantization_config`."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    scheme, _ = _scheme(preset)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored,
    )
    settings: dict[str, Any] = config.model_dump(mode="json")
    return settings


@cache
def _scheme(preset: str) -> tuple[Any, Any]:
    """compressed-tensors' settings of a preset, and the class that packs its format."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    return scheme, BaseCompressor.get_value_from_registry(scheme.format)


def _round_rows(
    rows: Tensor, dtype: torch.dtype, scheme: Any, compressor: Any, shared: dict[str, Tensor]
) -> dict[str, Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams

    least, most = _extremes(rows, scheme.weights)
    scale, _ = calculate_qparams(
        least, most, scheme.weights, global_scale=shared.get("weight_global_scale")
    )
    if scheme.format == "pack-quantized":  # whose scales vLLM keeps in the model's dtype
        scale = scale.to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    state = {"weight": rows, "weight_scale": scale.float(), **shared}
    packed: dict[str, Tensor] = compressor.compress(state, scheme)
    if scheme.format == "pack-quantized":
        packed["weight_scale"] = scale
    return packed


def _extremes(rows: Tensor, settings: Any) -> tuple[Tensor, Tensor]:
    """Least and greatest value of what shares a scale."""
    match settings.strategy:
        case "channel":
            return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)  # [rows, 1]
        case "group" | "tensor_group":
            groups = rows.unflatten(1, (-1, settings.group_size))
            return groups.amin(2), groups.amax(2)  # [rows, groups]
    assert settings.strategy == "block"
    from compressed_tensors.quantization.utils import maybe_pad_tensor_for_block_quant

    height, width = settings.block_structure
    padded = maybe_pad_tensor_for_block_quant(rows, (height, width))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocks.amin((1, 3)), blocks.amax((1, 3))  # [blocks, blocks]
