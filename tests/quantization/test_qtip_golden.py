"""Layers of each format decode to what an independent reference says, and wrongly read to else.

The files are written by `tests.support.qtip_golden`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from batchinfer.quantization.methods.qtip import relaxml
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.files import LayerFormat, format_of
from batchinfer.quantization.methods.qtip.loading import LayerPieces, Span
from batchinfer.quantization.methods.qtip.trellis import (
    stream_of_states,
    swap_halves,
    unpack,
)
from tests.support.qtip_golden import OUTPUTS

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data" / "qtip"
OURS: list[tuple[str, int]] = json.loads((DATA / "qtip.json").read_text())


def stored(file: str, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """(parts of a layer, some outputs of its weight)"""
    tensors = load_file(DATA / f"{file}.safetensors")
    stem = f"layers.{number}."
    parts = {name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)}
    return parts, tensors[f"expected.{number}"]


def coded(parts: dict[str, Tensor], layer: LayerFormat) -> Coded:
    """As the engine loads it."""
    num_in, num_out = (16 * size for size in parts["trellis"].shape[:2])
    pieces = LayerPieces("layer", Span(num_in, 0, num_in), [Span(num_out, 0, num_out)])
    for part, tensor in parts.items():
        pieces.add(part, tensor, [0])
    return pieces.coded(0, layer)


def is_like(layer: Coded, expected: Tensor) -> bool:
    found = dense(layer)[list(OUTPUTS)]
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def correlation(layer: Coded, expected: Tensor) -> float:
    found = dense(layer)[list(OUTPUTS)]
    return torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1].item()


@pytest.mark.parametrize("number", range(4))
def test_exl3_layers_are_what_the_reference_decodes(number: int) -> None:
    """Each code, and signs that are kept as bits."""
    parts, expected = stored("exl3", number)
    layer = format_of({"quant_method": "exl3"}, "layer", parts)
    assert layer.code == ("3inst", "mcg", "mul1", "mcg")[number]
    assert ("suh" in parts) == (number != 3)
    assert is_like(coded(parts, layer), expected)


@pytest.mark.parametrize("lane_order", ["exl3", "qtip"])
@pytest.mark.parametrize("number", range(4))
def test_our_layers_are_what_the_reference_decodes(number: int, lane_order: str) -> None:
    parts, expected = stored(f"qtip-{lane_order}", number)
    code, num_bits = OURS[number]
    assert parts["trellis"].shape[2] == 16 * num_bits
    assert is_like(coded(parts, LayerFormat(code, lane_order)), expected)


@pytest.mark.parametrize("number", range(2))
def test_layers_of_qtips_own_models_are_converted_to_what_they_were(number: int) -> None:
    """Swizzled tiles, Hadamards of whole sides, one of 12 x 32 inputs."""
    parts, expected = stored("relaxml", number)
    matrices = {12: load_file(DATA / "hadamard.safetensors")["had_12"]}
    converted = relaxml.convert_layer(parts, matrices)
    layer = LayerFormat("hyb", "qtip", has_full_in=True, has_full_out=True)
    assert is_like(coded(converted, layer), expected)
    shapes = relaxml.shapes(tuple(parts["trellis"].shape), len(parts["SU"]), len(parts["SV"]))
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == shapes


@pytest.mark.parametrize("wrong", ["lanes", "window", "halves", "code", "transposed"])
def test_a_wrong_flag_is_seen_in_the_weight(wrong: str) -> None:
    """And in no statistic: what is decoded wrongly has the same scale.

    The two lane orders have half of a tile's places in common, other mistakes next to nothing.
    """
    parts, expected = stored("qtip-exl3", 2)  # mul1, 1 bit
    layer = LayerFormat("mul1")
    right = coded(parts, layer)
    assert is_like(right, expected)
    trellis = parts["trellis"]
    if wrong == "lanes":
        layer = LayerFormat("mul1", "qtip")
    elif wrong == "code":
        layer = LayerFormat("mcg")
    elif wrong == "window":
        parts["trellis"] = swap_halves(stream_of_states(unpack(trellis, 1), 1, "start"))
    elif wrong == "halves":
        parts["trellis"] = swap_halves(trellis)
    else:
        parts["trellis"] = trellis.transpose(0, 1).contiguous()
    found = coded(parts, layer)
    assert not is_like(found, expected)
    assert abs(correlation(found, expected)) < (0.6 if wrong == "lanes" else 0.2)
    assert dense(found).std().item() == pytest.approx(dense(right).std().item(), rel=0.3)


def test_what_of_qtips_own_models_cannot_be_converted_is_said() -> None:
    parts, _ = stored("relaxml", 1)
    with pytest.raises(ValueError, match=r"a part of 12 x 12.*`had_12` in the file hadamard.saf"):
        relaxml.convert_layer(parts, {})
    with pytest.raises(ValueError, match="is not a Hadamard matrix"):
        relaxml.convert_layer(parts, {12: torch.ones(12, 12)})
    with pytest.raises(ValueError, match="cut for 8 devices"):
        relaxml.convert_layer({**parts, "rcp": torch.tensor(2)}, {})
    with pytest.raises(ValueError, match="384 inputs and 128 outputs is not in the layout"):
        relaxml.convert_layer({**parts, "trellis": parts["trellis"][1:]}, {})
    assert [relaxml.odd_size(size) for size in (4096, 11008, 14336, 28672)] == [1, 172, 28, 28]
    with pytest.raises(ValueError, match="18944 is not a power of two"):
        relaxml.odd_size(18944)
    assert "decode_mode '1mad'" in relaxml.unknown_params(
        {"codebook": "bitshift", "L": 16, "V": 2, "tlut_bits": 9, "decode_mode": "1mad"}
    )
