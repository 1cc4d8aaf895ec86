"""Bits for each weight of a checkpoint, from its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.config import ModelSettings
from batchinfer.evaluation.bits import HEAD, LAYER, OTHER, bits_of, read_bits, table
from batchinfer.model.contents import read_folder
from batchinfer.quantization import Tensor
from tests.support.jobs import MODEL

#: Kind of tests.support.checkpoints -> bits of a weight of its linear layers.
BITS = {
    "w8a8": 8.06,
    "w4a16": 4.14,
    "awq": 4.17,
    "gptq": 4.29,
    "bnb-nf4": 4.5,
    "bnb-nf4-nested": 4.13,
    "bnb-nf4-bf16": 4.5,
    "bnb-int8": 8.1,
    "fp8-block": 8.0,
    "fp8-tensor": 8.0,
    "fp8-channel": 8.1,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
}


def test_layers_and_head_are_counted_apart_and_a_tied_head_is_the_embedding() -> None:
    bits = read_bits(str(MODEL))
    assert bits.per_weight(LAYER) == bits.per_weight(HEAD) == 16
    assert bits.num_weights(HEAD) == 4096 * 256
    assert bits.num_weights(OTHER) == 256  # the last norm
    assert sum(map(bits.num_weights, (LAYER, HEAD, OTHER))) == 13_900_288 // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", BITS)
def test_a_packed_layer_has_as_many_weights_as_the_plain_one(kind: str, tmp_path: Path) -> None:
    """Whatever is packed, scaled and stored beside it; so bits are bytes by the true number."""
    from tests.support.checkpoints import write_checkpoint

    bits = read_bits(str(write_checkpoint(kind, tmp_path / kind)))
    plain = {module.name: module.num_weights for module in read_bits(str(MODEL)).modules}
    assert {module.name: module.num_weights for module in bits.modules} == plain
    assert bits.per_weight(LAYER) == pytest.approx(BITS[kind], abs=0.1)
    assert bits.per_weight(HEAD) == 16


def test_equal_layers_are_one_line_of_the_table() -> None:
    lines = {name: (kind, weights) for name, kind, weights, *_ in table(read_bits(str(MODEL)))}
    assert lines["model.layers.0-5.mlp.up_proj"] == (LAYER, 1024 * 256)
    assert lines["model.embed_tokens"] == (HEAD, 4096 * 256)
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("tensor", "per_weight"), [("lm_head.weight", 16), ("lm_head.weight_packed", 4)]
)
def test_the_head_of_a_tied_model_is_its_own_only_if_it_is_packed(
    tensor: str, per_weight: float, tmp_path: Path
) -> None:
    """A plain copy beside the embedding is not read, and the embedding counts."""
    model = read_folder(ModelSettings(path=str(MODEL)))
    kind, shape, num_bytes = ("U8", (4096, 128), 4096 * 128)
    if tensor.endswith(".weight"):
        kind, shape, num_bytes = "F32", (4096, 256), 4096 * 256 * 4
    model.weights.tensors[tensor] = Tensor(kind, shape, num_bytes)
    bits = bits_of(model)
    assert bits.per_weight(HEAD) == per_weight
    assert bits.num_weights(HEAD) == 4096 * 256
