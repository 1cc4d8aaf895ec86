"""Checkpoints that lack tensors are refused before anything is loaded; odd models are not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import ConfigError
from batchinfer.model.complete import check_complete
from batchinfer.model.weights import Tensor, Weights, read_header
from tests.support.endings import must_be_untouched
from tests.support.headers import change_header, keep_tensors
from tests.support.jobs import MODEL, Place, job, rows, run, write_job
from tests.support.models import read_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def without(weights: Weights, pattern: str) -> Weights:
    kept = {name: t for name, t in weights.tensors.items() if not re.search(pattern, name)}
    assert 0 < len(kept) < len(weights.tensors)
    return Weights(tensors=kept, file_names=weights.file_names)


def lacks(weights: Weights, text: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"incomplete: .*{words}.*Copy the model again"):
        check_complete(weights, text, Path("folder"))


# Real files.


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (r"layers\.3\.mlp\.", r"layers\.3\.mlp\.down_proj\.weight, .*; model\.safetensors holds"),
        (r"layers\.3\.mlp\.up_proj", r"layers\.3\.mlp\.up_proj\.weight \("),
        (r"layers\.0\.self_attn\.v_proj", r"layers\.0\.self_attn\.v_proj\.weight \("),
        (r"layers\.5\.self_attn\.o_proj", r"layers\.5\.self_attn\.o_proj\.weight \("),
        (r"layers\.2\.", r"lack model\.layers\.2 \("),
        (r"layers\.5\.", r"lack model\.layers\.5 \("),  # only config.json knows
        (r"layers\.[1-4]\.", r"layers\.1, model\.layers\.2, model\.layers\.3 and 1 more"),
    ],
)
def test_a_model_without_some_of_its_tensors_is_refused(
    folder: Path, lost: str, words: str
) -> None:
    assert keep_tensors(folder / "model.safetensors", lambda name: not re.search(lost, name))
    with pytest.raises(ConfigError, match=words):
        read_model(str(folder))


def test_parts_of_a_model_without_their_index_have_to_be_all_there(folder: Path) -> None:
    whole = folder / "model.safetensors"
    for number in range(3):
        part = Path(shutil.copy(whole, folder / f"model-0000{number}-of-00003.safetensors"))
        keep_tensors(part, lambda name, number=number: sum(name.encode()) % 3 == number)
    whole.unlink()
    read_model(str(folder))  # some tools begin at 0
    (folder / "model-00000-of-00003.safetensors").rename(
        folder / "model-00003-of-00003.safetensors"
    )
    read_model(str(folder))
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of 3 weight files, such as number 1 beside mo"):
        read_model(str(folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its imports
def test_a_quantized_checkpoint_without_a_layer_weight_or_scale_is_refused(
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.support.checkpoints import KINDS

    text = {"num_hidden_layers": 6}
    for name, kind in KINDS.items():
        packed = kind.pack(torch.randn(256, 256))
        save_file({n: t.contiguous() for n, t in packed.items()}, tmp_path / name)
        _, parts = read_header(tmp_path / name)
        assert len(parts) >= 2
        weights = plain([["mlp.down_proj.bias"]] * 6)
        for number in range(6):
            for module in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
                stem = f"model.layers.{number}.{module}"
                weights.tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        weights.file_names = dict.fromkeys(weights.tensors, "model.safetensors")
        check_complete(weights, text, Path("folder"))
        lacks(without(weights, r"layers\.3\.mlp\.up"), text, r"layers\.3\.mlp\.up_proj\.")
        lacks(without(weights, r"layers\.3\.(mlp|self)"), text, r"self_attn\.o_proj\.")
        for part in parts:
            lost = re.escape(f"model.layers.3.mlp.down_proj.{part}")
            lacks(without(weights, f"{lost}$"), text, rf"lack {lost} \(")


def test_of_three_layers_two_show_what_the_third_lacks() -> None:
    weights = plain([QKV] * 3)
    lacks(without(weights, r"2\.v_proj"), {}, r"lack model\.layers\.2\.v_proj\.weight \(")


def test_a_mixture_of_experts_is_refused_without_an_expert_or_a_part_of_one() -> None:
    weights = experts_model(num_dense=1)
    text = {"num_hidden_layers": 6}
    check_complete(weights, text, Path("folder"))
    for lost, words in (
        (r"layers\.3\.mlp\.experts\.2\.", r"lack model\.layers\.3\.mlp\.experts\.2 \("),
        (r"layers\.3\.mlp\.experts\.3\.", r"lack model\.layers\.3\.mlp\.experts\.3 \("),
        (r"layers\.3\.mlp\.experts\.3\.w2", r"experts\.3\.w2\.weight, .*\.w2\.weight_scale \("),
        (r"layers\.3\.mlp\.experts\.3\.w2\.weight_", r"lack .*experts\.3\.w2\.weight_scale \("),
        (r"layers\.3\.mlp\.experts\.\d\.w2\.weight$", r"experts\.0\.w2\.weight, .* and 1 more"),
        (r"layers\.3\.mlp\.experts", r"layers\.3\.mlp\.experts\.0\.w1\.weight, .*and 21 more"),
    ):
        lacks(without(weights, lost), text, words)


def test_every_command_refuses_an_incomplete_model(
    place_of: Place, folder: Path, tmp_path: Path
) -> None:
    keep_tensors(folder / "model.safetensors", lambda name: "layers.3.mlp." not in name)
    path = write_job(tmp_path, job(place_of, model={"path": str(folder)}))
    for command in ("run", "plan", "validate"):
        ended = run(path, command=(command,), fake={"fail_build": "the model was loaded"})
        assert ended.code == 2
        assert "is incomplete: its weights lack model.layers.3.mlp.down_proj.weight" in ended.stderr
    must_be_untouched(place_of)
    out = str(tmp_path / "out")
    quantized = run(str(folder), out, "--method", "int8", command=("quantize",), engine="real")
    assert quantized.code == 2
    assert "is incomplete" in quantized.stderr
    assert not Path(out).exists()


@pytest.fixture
def place_of(tmp_path: Path) -> Place:
    place = Place(str(tmp_path / "data"))
    place.write_parquet("in/s0.parquet", rows(2))
    return place


# Models that are whole, by the names of their tensors.


def named(tensors: Iterable[tuple[str, str]]) -> Weights:
    """(name, dtype); matrices, but for norms."""
    weights = Weights()
    for name, dtype in tensors:
        shape = (8,) if "norm" in name or name.endswith("_proj.bias") else (8, 8)
        weights.tensors[name] = Tensor(dtype, shape, 64)
        weights.file_names[name] = "model.safetensors"
    return weights


def plain(layers: Iterable[Iterable[str]], path: str = "model.layers") -> Weights:
    """Layers by the names of their modules."""
    return named(
        (f"{path}.{number}.{module}{'' if '.' in module[-6:] else '.weight'}", "BF16")
        for number, modules in enumerate(layers)
        for module in ("input_layernorm", *modules)
    )


def experts_model(num_dense: int) -> Weights:
    """Like DeepSeek's in FP8: dense layers first, and a last one for drafts."""
    names = []
    for layer in range(7):
        modules = ["self_attn.o_proj"]
        if layer < num_dense:
            modules += ["mlp.up_proj", "mlp.down_proj"]
        else:
            modules += [f"mlp.experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")]
            names.append((f"model.layers.{layer}.mlp.gate.weight", "BF16"))
        for module in modules:
            names.append((f"model.layers.{layer}.{module}.weight", "F8_E4M3"))
            names.append((f"model.layers.{layer}.{module}.weight_scale", "F32"))
    names.append(("model.layers.6.eh_proj.weight", "BF16"))
    return named(names)


def parted(*others: int, **own: str) -> Weights:
    """One asymmetric weight in each layer, and another kind of weight in layer 0 and `others`."""
    asymmetric = {"weight": "I8", "weight_scale": "BF16", "weight_zero_point": "I8"}
    return named(
        (f"model.layers.{n}.up.{part}", dtype)
        for n in range(6)
        for part, dtype in (own if n in (0, *others) else asymmetric).items()
    )


WEIGHT_NORM = [(n, part) for n in range(6) for part in ("weight_v", *(["weight_g"] if n else []))]
QKV = ("q_proj", "k_proj", "v_proj")
MAMBA = ("in_proj", "out_proj", "x_proj")


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (lambda: experts_model(0), {}),
        (lambda: experts_model(1), {}),
        (lambda: experts_model(3), {}),
        # Jamba: one layer with attention among such with Mamba, experts in every second layer.
        (
            lambda: plain(
                [
                    *(["attn.q", "attn.k"] if n == 4 else MAMBA),
                    *(["ff.up"] if n % 2 else ["ff.experts.0.up", "ff.experts.1.up", "ff.router"]),
                ]
                for n in range(8)
            ),
            {},
        ),
        # Nemotron-H: config.json tells that one layer is another kind.
        (
            lambda: plain(["up", "gate"] if n == 2 else ["up"] for n in range(6)),
            {"hybrid_override_pattern": "MM*MMM"},
        ),
        (
            lambda: plain(QKV[:2] if n == 5 else QKV for n in range(6)),
            {"layer_types": [*["sliding"] * 5, "full"]},
        ),
        # Gemma: layers whose keys and values are those of other layers.
        (lambda: plain(QKV if n < 4 else QKV[:1] for n in range(6)), {}),
        # Biases, and buffers of old models, in one layer and not in the others.
        (lambda: plain(["q_proj", *(["q_proj.bias"] if n else [])] for n in range(6)), {}),
        (lambda: plain(["q_proj", *(["attn.bias"] if n else [])] for n in range(6)), {}),
        # Layers that are all different.
        (lambda: plain([f"w{i}" for i in range(n)] for n in range(1, 7)), {}),
        # Only the first layer lacks a norm.
        (
            lambda: plain(["q_proj", *(["attn_norm"] if n else [])] for n in range(6)),
            {},
        ),
        # Mixed precision: layers that stayed unquantized, and such with fewer numbers a weight.
        (lambda: parted(weight="BF16"), {}),
        (lambda: parted(0, 5, weight="I8", weight_scale="BF16"), {}),
        (lambda: named((f"model.layers.{n}.up.{p}", "BF16") for n, p in WEIGHT_NORM), {}),
        # A tower of its own length and kind beside the language model, and a codec with gaps.
        (
            lambda: named(
                (name, "BF16")
                for name in (
                    *(f"codec.encoder.layers.{n}.conv.weight" for n in (0, 3)),
                    *(f"model.visual.blocks.{n}.attn.qkv.weight" for n in range(1, 9)),
                    *(f"model.language_model.layers.{n}.mlp.up.weight" for n in range(6)),
                )
            ),
            {},
        ),
        # Layers that do nothing.
        (
            lambda: named((f"model.layers.{n}.up.weight", "BF16") for n in (0, 1, 2, 4, 5)),
            {"block_configs": []},
        ),
        # More layers than there are: each counts twice; or all of two lists, at each use.
        (lambda: plain(QKV for n in range(6)), {"num_hidden_layers": 12, "num_layers": 6}),
        (
            lambda: named(
                (f"model.{name}_module.layers.{n}.up.weight", "BF16")
                for name in ("low", "high")
                for n in range(3)
            ),
            {"num_hidden_layers": 12},
        ),
        (lambda: named([("transformer.wte.weight", "BF16")]), {}),
    ],
)
def test_what_models_are_like_is_not_taken_for_damage(
    weights: Callable[[], Weights], text: dict[str, Any]
) -> None:
    check_complete(weights(), {"num_hidden_layers": 6} | text, Path("folder"))


# Headers that contradict themselves.


@pytest.mark.parametrize(
    ("start", "size"), [(-2, 0), (2, 0), (0, -2), (0, 2)], ids=["overlap", "gap", "less", "more"]
)
def test_a_header_whose_places_do_not_fit_is_refused(folder: Path, start: int, size: int) -> None:
    def change(header: dict[str, dict[str, Any]]) -> None:
        own = header["model.layers.3.mlp.up_proj.weight"]
        begin, end = own["data_offsets"]
        own["data_offsets"] = [begin + start, end + start + size]

    change_header(folder / "model.safetensors", change)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged: its header \w+ model"):
        read_model(str(folder))


def test_a_header_whose_shapes_do_not_fit_is_refused(folder: Path) -> None:
    def change(header: dict[str, dict[str, Any]]) -> None:
        header["model.layers.3.mlp.up_proj.weight"]["shape"][0] += 1

    change_header(folder / "model.safetensors", change)
    with pytest.raises(ConfigError, match=r"gives model\.layers\.3\.mlp\.up_proj\.weight, BF16 \["):
        read_model(str(folder))


def test_a_layer_without_its_trellis_is_missed_and_one_without_a_table_is_not() -> None:
    """Trellis codes (QTIP, EXL3): some codes have a table beside a layer, and layers may differ."""
    shapes = {"trellis": (8, 8, 32), "suh": (128,), "svh": (128,), "tlut": (512, 2)}
    tensors = {
        f"model.layers.{number}.mlp.{module}.{part}": Tensor("I16", shape, 2)
        for number in range(4)
        for module in ("up_proj", "down_proj")
        for part, shape in shapes.items()
    }
    whole = Weights(tensors=tensors, file_names=dict.fromkeys(tensors, "file"))
    lacks(without(whole, r"2\.mlp\.up_proj"), {}, r"layers\.2\.mlp\.up_proj\.trellis")
    check_complete(without(whole, r"2\.mlp\.up_proj\.tlut"), {}, Path("folder"))
