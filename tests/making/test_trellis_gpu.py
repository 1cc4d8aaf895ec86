"""The search of walks, and the coding of layers and models, on a GPU: as good as on a CPU."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchinfer.making.order import Reporter
from batchinfer.making.trellis.ldlq import Coder, code_layers
from batchinfer.making.trellis.make import Coding, Places, code_model
from batchinfer.making.trellis.viterbi import TorchSearch, search_on_cpu
from batchinfer.making.trellis.viterbi_cuda import CudaSearch, search_on_gpu
from batchinfer.native import cpu_flags
from batchinfer.quantization.methods.qtip.codes import gaussian_tlut, table

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # the first use compiles

MODEL = Path(__file__).resolve().parents[2] / "jobs" / "demo" / "model"
CODES = [*((code, bits) for code in ("mcg", "mul1", "1mad", "3inst") for bits in (2, 3, 4)),
         ("mcg", 5), ("mcg", 6), ("hyb", 2), ("hyb", 3)]  # fmt: skip


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


def values_of(code: str) -> Tensor:
    return table(code, gaussian_tlut() if code == "hyb" else None).float()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def cost(tiles: Tensor, states: Tensor, values: Tensor) -> Tensor:
    """Squared distance of each tile [n, 256] from its walk, float64."""
    return (values.to(tiles)[states.long()].flatten(1) - tiles).double().pow(2).sum(1)


@pytest.mark.parametrize(("code", "bits"), CODES)
@pytest.mark.parametrize("num_tiles", [1, 2, 301])
def test_the_kernel_finds_walks_as_near_as_the_search_in_torch(
    code: str, bits: int, num_tiles: int, libraries: Path
) -> None:
    """Not the same walks: of two that are equally near to a millionth either is taken."""
    values = values_of(code)
    search = search_on_gpu(values, bits, libraries)
    assert isinstance(search, CudaSearch)
    tiles = gaussian(num_tiles, 256)
    found, wanted = search(tiles), TorchSearch(values, bits)(tiles)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    distance = cost(tiles, found, values) / cost(tiles, wanted, values)
    assert distance.max() < 1 + 1e-3 and distance.mean() < 1 + 1e-5
    step = bits * values.shape[1]
    assert torch.equal(found.roll(1, 1) & ((1 << (16 - step)) - 1), found >> step)
    assert torch.equal(search(tiles), found)


def test_no_tiles_give_no_walks(libraries: Path) -> None:
    assert search_on_gpu(values_of("mcg"), 2, libraries)(gaussian(0, 256)).shape == (0, 256)


@pytest.mark.parametrize(("code", "bits"), [("mcg", 1), ("hyb", 4)])
def test_a_code_that_the_kernel_does_not_search_is_left_to_torch_and_said(
    code: str, bits: int, libraries: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        search = search_on_gpu(values_of(code), bits, libraries)
    assert isinstance(search, TorchSearch) and f"{bits} bits a weight" in caplog.text
    tiles = gaussian(40, 256)
    assert cost(tiles, search(tiles), values_of(code)).mean() < 256 * 1.7 * 4.0**-bits


def test_a_layer_is_coded_with_the_loss_that_it_has_on_a_cpu(libraries: Path) -> None:
    values = values_of("mcg")
    weight, inputs = gaussian(256, 384), gaussian(2000, 384, seed=1) @ gaussian(384, 384, seed=2)
    moments = inputs.T @ inputs / len(inputs)
    here = Coder(search_on_gpu(values, 2, libraries), values.cuda(), 2)
    found = code_layers([weight], moments, here, seed=3)[0]
    there = Coder(search_on_cpu(values, 2, cpu_flags(), libraries), values, 2)
    wanted = code_layers([weight.cpu()], moments.cpu(), there, seed=3)[0]
    assert found.loss == pytest.approx(wanted.loss, rel=0.05)


def test_the_demo_model_is_coded(libraries: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    texts = ["A package that reads tables and writes them again, slowly. " * 40] * 80
    losses: list[str] = []
    made = code_model(
        MODEL,
        target,
        Coding(2, "mcg", texts),
        Places(tmp_path / "finished", "key", libraries),
        frozenset(),
        Reporter(losses.append, lambda share: None, losses.append),
    )
    assert made.num_quantized == made.num_linear == 42
    assert (target / "model.safetensors").stat().st_size < 4_500_000
    assert sum("loss" in line for line in losses) == 6
