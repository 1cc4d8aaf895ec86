"""Trellis-coded checkpoints: what is written, what a death leaves, what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor

from batchinfer.making.order import Reporter
from batchinfer.making.trellis.finished import FinishedBlocks
from batchinfer.making.trellis.ldlq import CodedParts, Coder, code_layers, damped, feedback
from batchinfer.making.trellis.make import Coding, _tokens
from batchinfer.making.trellis.viterbi import search_on_cpu
from batchinfer.native import cpu_flags
from batchinfer.quantization.methods.qtip.codes import gaussian_tlut, table
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from tests.support.jobs import MODEL, Ended, kill, run, start, wait, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of its imports
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def coder(num_bits: int, cache: Path, code: str = "mcg") -> Coder:
    values = table(code, gaussian_tlut() if code == "hyb" else None).float()
    libraries = cache / "batchinfer" / "libraries"
    return Coder(search_on_cpu(values, num_bits, cpu_flags(), libraries), values, num_bits)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(num_inputs: int, num_tokens: int = 4096) -> Tensor:
    """Of inputs that depend on each other, some of them much larger than others."""
    mixed = gaussian(num_tokens, num_inputs) @ gaussian(num_inputs, num_inputs, seed=1)
    inputs = mixed + 0.3 * num_inputs**0.5 * gaussian(num_tokens, num_inputs, seed=2)
    inputs = inputs * torch.logspace(-1, 1, num_inputs)
    return inputs.T @ inputs / num_tokens


def loss(weight: Tensor, parts: CodedParts, moments: Tensor) -> float:
    """tr(E H E') / tr(W H W') in float64."""
    error, hessian = (weight - parts.weight).double(), moments.double()
    return (((error @ hessian) * error).sum() / ((weight.double() @ hessian) * weight).sum()).item()


# How a layer is coded.


def test_the_feedback_is_that_of_a_block_decomposition() -> None:
    """H = (I + F) D (I + F)', F below D's blocks of 16."""
    inputs = gaussian(200, 64)
    hessian = inputs.T @ inputs + torch.eye(64)
    lower = torch.eye(64) + feedback(hessian)
    inverse = torch.linalg.inv(lower.double())
    diagonal = (inverse @ hessian.double() @ inverse.T).float()
    blocks = diagonal.unflatten(0, (4, 16)).unflatten(2, (4, 16))
    for i in range(4):
        for j in range(4):
            assert (blocks[i, :, j].abs().max() > 1e-2) == (i == j)
    outside = feedback(hessian).unflatten(0, (4, 16)).unflatten(2, (4, 16))
    assert all(outside[i, :, j].abs().max() == 0 for i in range(4) for j in range(i, 4))


@pytest.mark.parametrize(("code", "num_bits"), [("mcg", 2), ("mul1", 4), ("hyb", 3), ("1mad", 1)])
def test_what_is_stored_is_read_as_the_weight_that_was_meant(
    code: str, num_bits: int, cache: Path
) -> None:
    """Through the reader's own decoder; near the unquantized weight, so no order is mistaken."""
    weights = [gaussian(128, 256), 0.01 * gaussian(256, 256, seed=1)]
    found = code_layers(weights, moments_of(256), coder(num_bits, cache, code), seed=5)
    tlut = gaussian_tlut() if code == "hyb" else None
    for weight, parts in zip(weights, found, strict=True):
        assert parts.trellis.shape == (16, len(weight) // 16, 16 * num_bits)
        read = dense(Coded(parts.trellis, parts.suh, parts.svh, code, tlut))
        torch.testing.assert_close(read, parts.weight, rtol=1e-3, atol=1e-4 * weight.abs().max())
        assert loss(weight, parts, moments_of(256)) < 1.1 * 4.0**-num_bits
        assert parts.loss == pytest.approx(
            loss(weight, parts, damped(moments_of(256), weight)), rel=1e-2
        )
    assert torch.equal(found[0].suh, found[1].suh)


def test_errors_are_moved_to_where_they_cost_less(cache: Path) -> None:
    """Half the loss of a coding that knows nothing of the inputs."""
    weight, moments = gaussian(128, 256), moments_of(256)
    informed = code_layers([weight], moments, coder(2, cache), seed=0)[0]
    plain = code_layers([weight], None, coder(2, cache), seed=0)[0]
    assert loss(weight, informed, moments) < 0.5 * loss(weight, plain, moments)
    assert loss(weight, plain, torch.eye(256)) == pytest.approx(0.0686, rel=0.1)


@pytest.mark.parametrize(
    ("moments", "said"),
    [(torch.full((128, 128), torch.nan), "not finite"), (torch.zeros(128, 128), "all zero")],
)
def test_moments_of_no_use_are_left_out_and_named(
    moments: Tensor, said: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = gaussian(128, 128)
    with caplog.at_level(logging.WARNING, "batchinfer.making"):
        found = code_layers([weight], moments, coder(2, cache), seed=0)[0]
    assert said in caplog.text
    plain = code_layers([weight], None, coder(2, cache), seed=0)[0]
    assert torch.equal(found.weight, plain.weight)


def test_moments_of_fewer_tokens_than_inputs_do(cache: Path) -> None:
    found = code_layers([gaussian(128, 128)], moments_of(128, 9), coder(2, cache), seed=0)[0]
    assert found.weight.isfinite().all() and found.loss < 0.1


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e4])
def test_weights_of_any_size_are_coded(factor: float, cache: Path) -> None:
    """As long as float16 scales hold them; zero rows and columns too."""
    weight = gaussian(128, 128) * factor
    weight[3] = 0
    weight[:, 5] = 0
    found = code_layers([weight], None, coder(4, cache), seed=0)[0]
    assert found.weight.isfinite().all()
    assert (found.weight - weight).pow(2).mean() <= 0.02 * factor**2


# Blocks that are finished.


def test_finished_blocks_are_found_under_their_key_alone(tmp_path: Path) -> None:
    blocks = FinishedBlocks(tmp_path / "blocks", "one")
    assert blocks.read("layers.0") is None
    blocks.write("layers.0", {"a": torch.arange(3)})
    found = FinishedBlocks(tmp_path / "blocks", "one").read("layers.0")
    assert found is not None and found["a"].tolist() == [0, 1, 2]
    assert FinishedBlocks(tmp_path / "blocks", "two").read("layers.0") is None
    assert FinishedBlocks(tmp_path / "blocks", "one").read("layers.0") is None


def test_a_damaged_block_is_made_again(tmp_path: Path) -> None:
    blocks = FinishedBlocks(tmp_path / "blocks", "one")
    blocks.write("layers.0", {"a": torch.arange(3)})
    (tmp_path / "blocks" / "layers.0.safetensors").write_bytes(b"torn")
    assert blocks.read("layers.0") is None
    (tmp_path / "blocks" / "key").write_bytes(b"\xff\xfe")
    FinishedBlocks(tmp_path / "blocks", "one")
    assert (tmp_path / "blocks" / "key").read_text() == "one"


# The command.


def write_model(folder: Path, intermediate_size: int = 128) -> Path:
    """Two blocks of 128 hidden numbers, of random weights, with the demo model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = json.loads((MODEL / "config.json").read_text())
    settings |= {"hidden_size": 128, "head_dim": 64, "intermediate_size": intermediate_size}
    settings |= {"num_attention_heads": 2, "num_hidden_layers": 2, "dtype": "bfloat16"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / file, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.parquet"
    prompts = pl.read_parquet(MODEL.parent / "prompts" / "*.parquet")
    rows = ["A text of a few words.", *prompts["description"].head(19)]
    pl.DataFrame({"description": rows}).write_parquet(file)
    return file


def arguments(model: Path, out: Path, texts: Path | None, *more: str) -> list[str]:
    found = [str(model), str(out), "--method", "qtip", "--bits", "2", *more]
    return found + (["--calibration", str(texts), "--column", "description"] if texts else [])


def quantize(*given: str, cache: Path) -> Ended:
    first, *rest = given
    environ = {"XDG_CACHE_HOME": str(cache)}
    return run(first, *rest, command=("quantize",), engine="real", environ=environ, timeout_s=250)


@pytest.fixture(scope="module")
def made(
    model: Path, texts: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    out = tmp_path_factory.mktemp("made") / "out"
    return out, quantize(*arguments(model, out, texts), cache=cache)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_command_codes_every_linear_layer_and_keeps_the_rest(
    made: tuple[Path, Ended], model: Path
) -> None:
    from safetensors.torch import load_file

    out, ended = made
    assert ended.code == 0, ended.stderr
    assert "block 2 of 2" in ended.stderr and "quantized 14 of 14 linear layers" in ended.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["default"] == {"K": 2, "V": 1, "code": "mcg"}
    assert settings["modules"] == {"lm_head": {"unquantized": True}}
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            assert torch.equal(after.pop(name), tensor)
            continue
        trellis, suh, svh = (after.pop(f"{layer}.{part}") for part in ("trellis", "suh", "svh"))
        read = dense(Coded(trellis, suh, svh, "mcg"))
        assert (read - tensor).pow(2).mean() < 0.12 * tensor.float().pow(2).mean()
    assert not after
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "tokenizer.json").exists()


def test_killed_within_a_block_it_continues_and_ends_with_the_same_bytes(
    made: tuple[Path, Ended], model: Path, texts: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, *rest = arguments(model, out, texts)
    environ = {"XDG_CACHE_HOME": str(cache)}
    process = start(first, *rest, command=("quantize",), engine="real", environ=environ)
    block = tmp_path / ".out.blocks" / "model.layers.0.safetensors"
    wait_until(block.exists, timeout_s=200, what="the first block")
    kill(process)
    wait(process)
    assert not out.exists()
    ended = quantize(first, *rest, cache=cache)
    assert ended.code == 0, ended.stderr
    assert "block 1 of 2 was finished before" in ended.stderr
    assert contents(out) == contents(made[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sizes_that_128_does_not_divide_stay_unquantized_and_are_named(
    texts: Path, cache: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", intermediate_size=192)
    ended = quantize(*arguments(model, tmp_path / "out", None), cache=cache)
    assert ended.code == 0, ended.stderr
    assert "mlp.gate_proj, model.layers.0.mlp.up_proj: unquantized, as 128 does not" in ended.stderr
    assert "no calibration texts" in ended.stderr
    assert "quantized 8 of 14 linear layers" in ended.stderr
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["modules"]["model.layers.1.mlp.down_proj"] == {"unquantized": True}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rows", "1"], "128 are needed"),
        (["--code", "hyb", "--bits", "9"], "9 is not in the range 1<=x<=8"),
        (["--code", "hyb", "--bits", "5"], "more than 4 bits do not make it more accurate"),
        (["--code", "cb7"], "'cb7' is not one of"),
        (["--method", "int4"], "takes no --calibration"),
    ],
)
def test_what_cannot_be_made_is_refused(
    more: list[str], said: str, model: Path, texts: Path, cache: Path, tmp_path: Path
) -> None:
    ended = quantize(*arguments(model, tmp_path / "out", texts, *more), cache=cache)
    assert ended.code == 2 and said in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["qtip", "int8"])
def test_a_nan_weight_is_named(method: str, model: Path, tmp_path: Path, cache: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    bits = ("--bits", "2") if method == "qtip" else ()
    ended = quantize(str(damaged), str(tmp_path / "out"), "--method", method, *bits, cache=cache)
    assert ended.code == 2, ended.stderr
    assert "model.layers.1.mlp.up_proj.weight has 1 values that are NaN" in ended.stderr
    assert "row 3, column 5" in ended.stderr and not (tmp_path / "out").exists()


def test_of_a_long_row_the_first_tokens_are_taken(model: Path, tmp_path: Path, cache: Path) -> None:
    """Memory is that of rows of 2,048 tokens, whatever the texts are."""
    long = tmp_path / "long.parquet"
    pl.DataFrame({"description": ["a word and " * 200_000]}).write_parquet(long)
    coding = Coding(2, "mcg", pl.read_parquet(long)["description"].to_list())
    ignored = Reporter(lambda said: None, lambda share: None, lambda said: None)
    tokens = _tokens(model, coding, ignored, 128)
    assert tokens.numel() == 2048
    ended = quantize(*arguments(model, tmp_path / "out", long), cache=cache)
    assert ended.code == 0, ended.stderr
    assert "the first 2,048 tokens of 1 longer rows" in ended.stderr
    assert "Token indices" not in ended.stderr


def test_a_layer_that_float16_scales_cannot_hold_is_named(
    model: Path, tmp_path: Path, cache: Path
) -> None:
    from safetensors.torch import load_file, save_file

    uneven = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(uneven / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-9
    save_file(tensors, uneven / "model.safetensors", metadata={"format": "pt"})
    ended = quantize(*arguments(uneven, tmp_path / "out", None), cache=cache)
    assert ended.code == 0, ended.stderr
    assert "model.layers.0.mlp.up_proj is lost: its weights are too small" in ended.stderr


def test_bits_and_codes_belong_to_methods_that_have_them(tmp_path: Path, cache: Path) -> None:
    for options, said in (
        (["--method", "qtip"], "needs --bits"),
        (["--method", "int8", "--bits", "4"], "takes no --bits"),
        (["--method", "qtip", "--bits", "2", "--column", "x"], "go together"),
    ):
        ended = quantize(str(MODEL), str(tmp_path / "out"), *options, cache=cache)
        assert ended.code == 2 and said in ended.stderr
