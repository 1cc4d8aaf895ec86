"""Trellis-coded layers: what a checkpoint may hold, how it is cut between devices, and computed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from batchinfer.errors import ConfigError
from batchinfer.quantization import (
    Loading,
    Machine,
    Stored,
    Tensor,
    choose,
    detect,
    method_of,
)
from batchinfer.quantization.methods.qtip import linear
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.files import LayerFormat
from batchinfer.quantization.methods.qtip.loading import LayerPieces, Span, random_parts

pytestmark = pytest.mark.slow

QTIP: dict[str, Any] = {
    "quant_method": "qtip",
    "format_version": 1,
    "L": 16,
    "T": 256,
    "default": {"K": 2, "V": 1, "code": "mcg"},
    "modules": {"a": {"K": 3, "V": 1, "code": "mul1"}, "head": {"unquantized": True}},
}
EXL3 = {"quant_method": "exl3", "bits": 3.0}
FULL = QTIP | {"had_in": "full", "had_out": "full"}
TEXT = {"hidden_size": 256, "tie_word_embeddings": False}
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"


def header(dtype: str, *shape: int) -> Tensor:
    return Tensor(dtype, shape, 2 * int(torch.tensor(shape).prod()))


def layer_of(num_bits: int, num_in: int = 256, num_out: int = 128) -> dict[str, Tensor]:
    return {
        "trellis": header("I16", num_in // 16, num_out // 16, 16 * num_bits),
        "suh": header("F16", num_in),
        "svh": header("F16", num_out),
    }


def stored(settings: dict[str, Any], layers: dict[str, dict[str, Tensor]]) -> Stored:
    checkpoint = detect(settings, "config.json")
    tensors = {f"{m}.{part}": t for m, parts in layers.items() for part, t in parts.items()}
    tensors["norm.weight"] = header("BF16", 256)
    return Stored(checkpoint.scheme, checkpoint.words, settings, tensors, {"I16": 9}, "folder")


def check(
    settings: dict[str, Any],
    layers: dict[str, dict[str, Tensor]],
    text: dict[str, Any] | None = None,
) -> None:
    found = replace(stored(settings, layers), text=text or {})
    method = method_of(found.scheme)
    assert method is not None
    method.check_stored(found)


def test_checkpoints_whose_tensors_match_their_settings_are_accepted() -> None:
    check(QTIP, {"a": layer_of(3), "b": layer_of(2)})
    check(EXL3, {"a": layer_of(3), "b": layer_of(6) | {"mcg": header("I32")}})
    old = {"su": header("I16", 16), "sv": header("I16", 8), "trellis": layer_of(2)["trellis"]}
    check(EXL3, {"a": old})


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        (EXL3, {"trellis": header("I16", 16, 8, 40)}, r"trellis is \[16, 8, 40\], and not \[in / "),
        (EXL3, {"trellis": header("I16", 16, 8 * 48)}, r"and not \[in / 16, out / 16, 16 K\]"),
        (EXL3, {"trellis": header("I32", 16, 8, 48)}, "its trellis is I32, and not int16"),
        (EXL3, {"trellis": header("I16", 16, 9, 48)}, "has 144 outputs, and 128 does not divide"),
        (EXL3, {"trellis": None}, "it has suh and svh and no trellis"),
        (EXL3, {"suh": None}, "it has no suh, the signs and scales of its inputs"),
        (EXL3, {"svh": None}, "it has no svh, the signs and scales of its outputs"),
        (EXL3, {"svh": header("F16", 64)}, r"svh is \[64\] beside 128 outputs of the trellis"),
        (EXL3, {"mcg": header("I32"), "mul1": header("I32")}, "two codes at once, mcg and mul1"),
        (QTIP, {"mcg": header("I32")}, "config.json says code mul1, and a tensor beside it mcg"),
        (QTIP, {"tlut": header("F16", 512, 2)}, r"code mul1 has a table \(tlut\)"),
        (QTIP, {"trellis": header("I16", 16, 8, 64)}, "says 3 bits, and its trellis .* has 4"),
        (EXL3, {"suh": header("I32", 256)}, "suh is I32, and not one of F16, BF16, F32"),
        (EXL3, {"weight": header("BF16", 128, 256)}, "it has a trellis and a weight"),
        (EXL3, {"trellis": header("I16", 0, 8, 48)}, r"trellis \[0, 8, 48\] has no inputs"),
        (EXL3, {"su": header("I16", 8)}, r"su is I16 \[8\] beside 256 inputs, and not I16 \[16\]"),
        (EXL3, {"sv": header("F16", 128)}, r"sv is F16 \[128\] beside 128 outputs, and not I16 \["),
        (QTIP, {"had_in": header("I8", 4, 4)}, "config.json says nothing of a Hadamard of that"),
        (
            FULL,
            {"had_in": header("I8", 12, 12)},
            r"had_in is \[12, 12\] beside 256 inputs, and not",
        ),
        (FULL, {"had_out": header("I8", 4)}, r"had_out is \[4\] beside 128 outputs, and not \[q"),
        (FULL, {"had_in": header("I32", 4, 4)}, "had_in is I32, and not one of I8, F16"),
        (FULL, layer_of(3, 384), "it has no had_in, which 384 inputs need, as no power of two"),
        (QTIP, {"tlut": header("F32", 512, 2)}, r"table \(tlut\) is F32 \[512, 2\], and not F16"),
        (
            QTIP,
            {"tlut": header("F16", 100, 2)},
            r"tlut\) is F16 \[100, 2\], and not F16",
        ),
    ],
)
def test_a_layer_that_cannot_be_right_is_named(
    settings: dict[str, Any], change: dict[str, Tensor | None], words: str
) -> None:
    layer: dict[str, Tensor | None] = layer_of(3) | change
    layers = {"a": {part: t for part, t in layer.items() if t is not None}, "b": layer_of(2)}
    with pytest.raises(ConfigError, match=f"^folder: a: .*{words}"):
        check(settings, layers)


def model_of(**changes: dict[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """A block and what stands beside all blocks. `changes`: by the last parts of names."""
    layers: dict[str, dict[str, Tensor]] = {
        "model.embed_tokens": {"weight": header("BF16", 512, 256)},
        "lm_head": {"weight": header("BF16", 512, 256)},
        **{f"{ATTENTION}.{x}_proj": layer_of(2, 256, 256) for x in "qkvo"},
        **{f"{MLP}.{x}_proj": layer_of(2, 256, 512) for x in ("gate", "up")},
        f"{MLP}.down_proj": layer_of(2, 512, 256),
    }
    changed = {name: changes.get(name.rpartition(".")[2], parts) for name, parts in layers.items()}
    return {name: parts for name, parts in changed.items() if parts is not None}


PLAIN = {"weight": header("BF16", 256, 256)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lm_head": None}, "neither a trellis nor a weight of lm_head, the output layer, which"),
        ({"q_proj": None}, rf"a weight of {ATTENTION}.q_proj, and {ATTENTION}.k_proj has one"),
        ({"o_proj": None}, rf"a weight of {ATTENTION}.o_proj, .* copy it again, or quantize"),
        ({"up_proj": None}, rf"a weight of {MLP}.up_proj, and"),
        ({"down_proj": None}, rf"a weight of {MLP}.down_proj, and"),
        ({"q_proj": PLAIN}, "q_proj: it is not coded and k_proj beside it is, and vLLM computes"),
        ({"v_proj": layer_of(2, 128)}, "v_proj: its trellis has 128 inputs, and hidden_size of co"),
        ({"o_proj": layer_of(2, 256)}, "o_proj: its trellis has 128 outputs, and hidden_size of"),
        ({"down_proj": layer_of(2, 256, 256)}, "has 256 inputs, and up_proj beside it 512 outputs"),
    ],
)
def test_what_a_model_lacks_or_cannot_hold_is_named_before_it_is_loaded(
    changes: dict[str, dict[str, Tensor] | None], words: str
) -> None:
    """The names of its layers are those that most models have."""
    settings = QTIP | {"modules": {}}
    check(settings, model_of(), TEXT)
    check(settings, model_of(o_proj=PLAIN), TEXT)
    with pytest.raises(ConfigError, match=words):
        check(settings, model_of(**changes), TEXT)


def test_an_output_layer_may_be_the_embedding_except_in_exl3() -> None:
    """EXL3 codes that of every model, and its models are not tied whatever config.json says."""
    for text in ({}, {"tie_word_embeddings": True}):
        check(QTIP | {"modules": {}}, model_of(lm_head=None), text)
        with pytest.raises(ConfigError, match="neither a trellis nor a weight of lm_head"):
            check(EXL3, model_of(lm_head=None), text)
    with pytest.raises(ConfigError, match="v_proj: its trellis has 128 inputs, and that of q_proj"):
        check(EXL3, model_of(v_proj=layer_of(2, 128)))


def test_a_matrix_that_is_no_hadamard_is_refused_while_it_loads() -> None:
    """Of zeros it made a layer of zeros."""
    parts = parts_of(256, 128) | {"had_in": torch.zeros(4, 4, dtype=torch.int8)}
    layer = LayerFormat("mcg", has_full_in=True)
    for matrix, is_right in ((torch.zeros(4, 4), False), (torch.ones(4, 4), False),
                             (1 - 2 * torch.eye(4), True)):  # fmt: skip
        found = LayerPieces("layer", Span(256, 0, 256), [Span(128, 0, 128)])
        for part, tensor in (parts | {"had_in": matrix.to(torch.int8)}).items():
            found.add(part, tensor, [0])
        if is_right:
            assert found.coded(0, layer).full_in is not None
            continue
        with pytest.raises(ValueError, match="layer: had_in is not a Hadamard matrix of 1 and -1"):
            found.coded(0, layer)


def test_settings_and_layers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="that a is quantized, and it has no trellis"):
        check(QTIP, {"b": layer_of(2)})
    with pytest.raises(ConfigError, match="that head is unquantized, and it has a trellis"):
        check(QTIP, {"a": layer_of(3), "head": layer_of(2)})
    with pytest.raises(ConfigError, match="most of its weights are stored as I16"):
        check(EXL3, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "does not know the scheme qtip with format_version 2"),
        ({"L": 12}, "qtip with L 12"),
        ({"lane_order": "rows"}, "lane_order 'rows'"),
        ({"default": {"K": 2, "code": "rptc"}}, "code 'rptc'"),
        ({"default": {"K": 2, "V": 2, "code": "mcg"}}, "V 2 of code mcg"),
        ({"default": None}, "not of the form that family 'qtip' has"),
    ],
)
def test_a_format_of_another_version_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        detect({**QTIP, **change}, "config.json")


def test_memory_is_that_of_the_decoded_weights_on_a_cpu() -> None:
    method = method_of("qtip")
    assert method is not None
    parts = {f"a.{part}": tensor for part, tensor in layer_of(2).items()}

    def total(scheme: str, device: str, dtype_bytes: int) -> int:
        loading = Loading(scheme, device, dtype_bytes)
        return sum(method.loaded_bytes(loading, name, t) for name, t in parts.items())

    assert total("qtip", "cpu", 2) == 256 * 128 * 2
    assert total("qtip", "cpu", 4) == 256 * 128 * 4
    assert total("qtip", "cuda", 2) == 256 * 128 // 4 + 2 * (256 + 128)
    assert total("qtip-full", "cuda", 2) == 256 * 128 * 2
    assert method.count_weights({}, "a", layer_of(2)) == 256 * 128


def pieces(parts: dict[str, torch.Tensor], inputs: Span, outputs: Span) -> Coded:
    found = LayerPieces("layer", inputs, [outputs])
    for part, tensor in parts.items():
        found.add(part, tensor, [0])
    return found.coded(0, LayerFormat("mcg"))


def parts_of(num_in: int, num_out: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    parts = random_parts(num_in, num_out, {"K": 2, "code": "mcg"})
    parts["suh"] = torch.randn(len(parts["suh"])).half()
    parts["svh"] = torch.randn(len(parts["svh"])).half()
    return parts


@pytest.mark.parametrize("num_devices", [2, 4])
def test_the_shares_of_several_devices_are_the_layer_of_one(num_devices: int) -> None:
    """Cut by outputs they are put side by side, cut by inputs their products are added."""
    parts = parts_of(512, 1024)
    whole = pieces(parts, Span(512, 0, 512), Span(1024, 0, 1024))
    x = torch.randn(3, 512)
    expected = x @ dense(whole).T
    by_output, by_input = [], []
    for rank in range(num_devices):
        share = 1024 // num_devices
        span = Span(1024, rank * share, (rank + 1) * share)
        by_output.append(x @ dense(pieces(parts, Span(512, 0, 512), span)).T)
        share = 512 // num_devices
        span = Span(512, rank * share, (rank + 1) * share)
        layer = pieces(parts, span, Span(1024, 0, 1024))
        by_input.append(x[:, span.first : span.end] @ dense(layer).T)
    torch.testing.assert_close(torch.cat(by_output, 1), expected)
    torch.testing.assert_close(sum(by_input), expected, rtol=1e-4, atol=1e-3)


def test_a_cut_within_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its 512 inputs would be cut at 64 and 128 .* lower mod"):
        LayerPieces("layer", Span(512, 64, 128), [Span(128, 0, 128)])
    parts = parts_of(256, 256)
    found = LayerPieces("layer", Span(256, 0, 128), [Span(256, 0, 256)])
    for part, tensor in parts.items():
        found.add(part, tensor, [0])
    with pytest.raises(ValueError, match="Hadamard over a whole side, which cannot be cut"):
        found.coded(0, LayerFormat("mcg", has_full_in=True))


def test_what_is_stored_as_one_layer_becomes_several() -> None:
    """As Phi-3 stores queries, keys and values."""
    parts = parts_of(256, 512)
    whole = dense(pieces(parts, Span(256, 0, 256), Span(512, 0, 512)))
    spans = [Span(256, 0, 256), Span(128, 0, 128), Span(128, 0, 128)]
    found = LayerPieces("qkv", Span(256, 0, 256), spans)
    for part, tensor in parts.items():
        found.add(part, tensor, [0, 1, 2])
    shards = [dense(found.coded(index, LayerFormat("mcg"))) for index in range(3)]
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("suh"), "layer: it has no suh"),
        (lambda parts: parts.pop("trellis"), "layer: it has suh and svh and no trellis"),
        (lambda parts: parts.update(parts_of(256, 256)), "256 outputs, and the model 128"),
        (lambda parts: parts["svh"].fill_(torch.nan), "layer: svh has NaN or infinity"),
    ],
)
def test_a_layer_that_did_not_arrive_as_the_model_needs_it_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    """While vLLM loads, where no check of ours came before."""
    parts = parts_of(256, 128)
    change(parts)
    with pytest.raises(ValueError, match=words):
        pieces(parts, Span(256, 0, 256), Span(128, 0, 128))


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_several_layers_side_by_side_multiply_as_their_weights(
    kind: str, num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different bits, codes and sizes; any number of tokens; inputs that are a view."""
    shards = []
    for seed, (num_out, code, num_bits) in enumerate([(256, "mcg", 2), (128, "hyb", 3)]):
        torch.manual_seed(seed)
        parts = random_parts(256, num_out, {"K": num_bits, "code": code})
        shards.append(Coded(**parts, code=code))
    if kind == "torch":
        monkeypatch.setattr(linear, "backend_for", lambda device_type: linear.TorchBackend())
    packed = linear.backend_for("cpu").pack(shards)
    x = torch.randn(2, num_tokens, 512).to(dtype)[..., ::2]
    y = linear.run_linear(x, packed)
    weight = torch.cat([dense(shard) for shard in shards])
    assert y.dtype == dtype and y.shape == (2, num_tokens, 384)
    expected = torch.nn.functional.linear(x.float(), weight)
    # A product is rounded once or twice, and torch's weights are.
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert ((y.float() - expected).abs() <= limit * weight.norm(dim=1)).all()


def test_the_operator_is_one_that_compilers_may_not_look_into() -> None:
    packed = linear.backend_for("cpu").pack([Coded(**parts_of(128, 128), code="mcg")])
    arguments = (torch.randn(4, 128), packed.tensors, packed.plan, packed.num_out)
    torch.library.opcheck(
        torch.ops.batchinfer.qtip_linear.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_settings_are_what_json_holds() -> None:
    assert detect(json.loads(json.dumps(QTIP)), "x").scheme == "qtip"
    full = copy.deepcopy(QTIP) | {"had_in": "full"}
    assert detect(full, "x").scheme == "qtip-full"


def test_a_model_of_the_authors_own_code_is_refused_with_how_to_convert_it() -> None:
    settings = {"quant_method": "quip_params", "codebook": "bitshift"}
    check(settings, {"a": {"trellis": header("I16", 128, 32), "SU": header("F16", 256)}})
    checkpoint = detect(settings, "config.json")
    for machine in (Machine("cpu", engine="vllm"), Machine("cuda", (9, 0), engine="vllm")):
        with pytest.raises(ConfigError, match=r"authors' code .* quantize MODEL OUT --method qtip"):
            choose("auto", checkpoint, machine, dtype="float16", is_dtype_asked=False)
