"""A model of QTIP's own code becomes one that runs here, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchinfer.cli.quantize import convert_model
from batchinfer.errors import ConfigError
from batchinfer.making.converted import convert
from batchinfer.making.foreign import is_convertible
from batchinfer.quantization import RECIPES, Checkpoint, detect
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from tests.support.jobs import run

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "data" / "qtip"
PARAMS = {
    "codebook": "bitshift",
    "codebook_version": 0,
    "L": 16,
    "K": 2,
    "V": 2,
    "tlut_bits": 9,
    "decode_mode": "quantlut_sym",
    "td_x": 16,
    "td_y": 16,
}


def write_model(folder: Path, *, has_matrices: bool = True, **params: Any) -> Path:
    """Both golden layers beside an embedding; not a whole model."""
    folder.mkdir()
    stored = load_file(GOLDEN / "relaxml.safetensors")
    tensors = {name: t for name, t in stored.items() if name.startswith("layers.")}
    tensors["model.embed_tokens.weight"] = torch.randn(64, 128).half()
    save_file(tensors, folder / "model.safetensors")
    if has_matrices:
        save_file(load_file(GOLDEN / "hadamard.safetensors"), folder / "hadamard.safetensors")
    config = {"model_type": "llama", "quip_params": PARAMS | params}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_the_converted_model_has_the_same_weights(tmp_path: Path) -> None:
    source, target = write_model(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    assert is_convertible(source, RECIPES["qtip"])
    steps: list[tuple[int, int]] = []
    assert convert(source, target, lambda *done: steps.append(done)) == 2
    assert steps == [(1, 2), (2, 2)]
    config = json.loads((target / "config.json").read_text())
    assert "quip_params" not in config and not is_convertible(target, RECIPES["qtip"])
    assert detect(config["quantization_config"], "x") == Checkpoint("qtip-full", "qtip")
    modules = config["quantization_config"]["modules"]
    assert [modules[f"layers.{i}"]["K"] for i in range(2)] == [2, 3]
    assert (target / "tokenizer_config.json").exists()
    tensors = load_file(target / "model.safetensors")
    expected = load_file(GOLDEN / "relaxml.safetensors")
    plain = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], plain)
    for i in range(2):
        stem = f"layers.{i}."
        parts = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        sides = {
            "full_in": parts.pop("had_in", torch.ones(1, 1)),
            "full_out": parts.pop("had_out", torch.ones(1, 1)),
        }
        weight = dense(Coded(**parts, code="hyb", lane_order="qtip", **sides))
        found = weight[[0, 1, 37, 127]]
        torch.testing.assert_close(found, expected[f"expected.{i}"], rtol=1e-4, atol=1e-6)


def test_the_command_publishes_a_whole_folder_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "source")
    convert_model(source, tmp_path / "out", RECIPES["qtip"])
    assert "the weights of" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    bad = write_model(tmp_path / "bad", has_matrices=False)
    with pytest.raises(ConfigError, match="had_12"):
        convert_model(bad, tmp_path / "nothing", RECIPES["qtip"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "out", "source"]


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name, model, words in (
        ("mode", {"decode_mode": "1mad"}, "decode_mode '1mad'"),
        ("matrix", {"has_matrices": False}, r"layers.1: its Hadamard .* `had_12` in the file"),
    ):
        source = write_model(tmp_path / name, **model)
        with pytest.raises(ConfigError, match=words):
            convert(source, tmp_path / "out", lambda *_: None)
    source = write_model(tmp_path / "lost")
    tensors = load_file(source / "model.safetensors")
    del tensors["layers.0.SV"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers.0 has a trellis and no SV"):
        convert(source, tmp_path / "out", lambda *_: None)


@pytest.mark.parametrize(
    "options",
    [("--bits", "3"), ("--code", "mcg"), ("--calibration", "texts.parquet", "--column", "t")],
)
def test_options_for_weights_that_are_coded_already_are_refused(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    arguments = (str(out), "--method", "qtip", *options)
    ended = run(str(source), *arguments, command=("quantize",), engine="real")
    assert ended.code == 2
    assert f"only rewritten, so leave out {options[0]}" in ended.stderr
    assert not out.exists()
