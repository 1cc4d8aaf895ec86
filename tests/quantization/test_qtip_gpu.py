"""The kernels on a GPU that they are written for: bits of the reference, products, graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchinfer.native import PREBUILT
from batchinfer.quantization.methods.qtip import cuda_backend, linear
from batchinfer.quantization.methods.qtip.codes import gaussian_tlut, table
from batchinfer.quantization.methods.qtip.cuda import Layer, counters_for, words_of
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.trellis import decode_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # the first use compiles

CODES = ("mcg", "3inst", "mul1", "1mad", "hyb")
TOKENS = (1, 2, 3, 4, 8, 15, 16, 17, 63, 64, 65, 128, 144, 255, 257, 1024)
#: Relative error of a product: of float16 activations, and of the output's rounding.
LIMITS = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 4e-3}
EVERY = [*itertools.product((2, 3, 4), CODES, ("exl3",)), (1, "mcg", "exl3"), (8, "mul1", "exl3"),
         (2, "hyb", "qtip"), (5, "mcg", "qtip")]  # fmt: skip


@pytest.fixture(autouse=True)
def _gpu() -> None:
    reason = cuda_backend.why_none()
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)


@cache
def tlut(num_bits: int = 9) -> Tensor:
    return gaussian_tlut(num_bits).cuda()


def random_coded(
    size_in: int, size_out: int, bits: int, code: str, lane_order: str = "exl3"
) -> Coded:
    shape = (size_in // 16, size_out // 16, 16 * bits)
    signs = torch.randint(0, 2, (size_in + size_out,), device="cuda") * 2.0 - 1.0
    scales = (signs * (0.5 + torch.rand(size_in + size_out, device="cuda"))).half()
    return Coded(
        trellis=torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda"),
        suh=scales[:size_in],
        svh=scales[size_in:] / 64,
        code=code,
        tlut=tlut() if code == "hyb" else None,
        lane_order=lane_order,
    )


def expected(x: Tensor, *shards: Coded) -> Tensor:
    """In float64, by the weights in the basis of the activations."""
    weight = torch.cat([dense(shard) for shard in shards])
    return x.double() @ weight.double().T


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("bits", "code", "lane_order"), EVERY)
def test_decoded_weights_are_those_of_the_reference_bit_for_bit(
    bits: int, code: str, lane_order: str
) -> None:
    coded = random_coded(1152, 896, bits, code, lane_order)
    values = table(code, coded.tlut).cuda()
    layer = Layer(
        weights=words_of(coded.trellis),
        suh=coded.suh,
        svh=coded.svh,
        counters=counters_for(896, coded.suh.device),
        code=code,
        bits=bits,
        table=coded.tlut,
        lane_order=lane_order,
    )
    found = cuda_backend.library(bits, code, lane_order).dense(layer, 0, 896)
    assert torch.equal(found.T, decode_tiles(coded.trellis, values, lane_order))


@pytest.mark.parametrize(("bits", "code", "lane_order"), EVERY)
def test_a_layer_gives_what_its_dense_weight_gives_for_any_number_of_tokens(
    bits: int, code: str, lane_order: str
) -> None:
    coded = random_coded(1152, 896, bits, code, lane_order)
    packed = linear.backend_for("cuda").pack([coded])
    for tokens, (dtype, limit) in itertools.product((0, *TOKENS), LIMITS.items()):
        x = torch.randn(tokens, 1152, device="cuda").to(dtype)
        found = linear.run_linear(x, packed)
        assert found.shape == (tokens, 896) and found.dtype == dtype
        if tokens:
            assert error(found, expected(x, coded)) < limit, (tokens, dtype)
            assert torch.equal(found, linear.run_linear(x, packed)), (tokens, dtype)


def test_parts_that_differ_in_bits_codes_or_signs_are_put_side_by_side() -> None:
    """q, k and v; two of them alike are one launch."""
    shards = [random_coded(512, 384, 3, "mcg"), random_coded(512, 128, 4, "mul1")]
    shards += [random_coded(512, 128, 4, "mul1"), random_coded(512, 256, 2, "hyb")]
    shards[2] = shards[2]._replace(suh=shards[1].suh)
    packed = linear.backend_for("cuda").pack(shards)
    assert packed.plan.count('"bits"') == 3
    for tokens in (1, 16, 100, 600):
        x = torch.randn(2, tokens, 512, device="cuda").bfloat16().transpose(0, 1)
        found = linear.run_linear(x, packed)
        assert error(found, expected(x, *shards)) < 4e-3


def test_a_smaller_table_of_hyb_is_widened() -> None:
    coded = random_coded(256, 256, 2, "hyb")._replace(tlut=tlut(7))
    x = torch.randn(5, 256, device="cuda").half()
    found = linear.run_linear(x, linear.backend_for("cuda").pack([coded]))
    assert error(found, expected(x, coded)) < 1e-3


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("kind", ["kernels", "reference"])
@pytest.mark.parametrize("tokens", [1, 16, 48, 200, 512])
def test_a_cuda_graph_replays_it_on_other_numbers(tokens: int, kind: str) -> None:
    coded = [random_coded(1024, 512, 2, "mcg"), random_coded(1024, 256, 3, "hyb")]
    backend = linear.backend_for("cuda") if kind == "kernels" else linear.TorchBackend()
    packed = backend.pack(coded)
    x = torch.randn(tokens, 1024, device="cuda").half()
    y = torch.empty(tokens, 768, dtype=torch.float16, device="cuda")
    graph = captured(lambda: y.copy_(backend.run(x, packed)))
    for _ in range(2):
        x.copy_(torch.randn(tokens, 1024, device="cuda"))
        graph.replay()
        assert error(y, expected(x, *coded)) < 2e-3


def test_what_the_kernels_cannot_compute_is_left_to_torch_and_reported_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of 2^10 pairs; and 7-bit weights without a compiler."""
    wide = random_coded(256, 256, 2, "hyb")._replace(tlut=tlut(10))
    many_bits = random_coded(256, 128, 7, "mul1", "qtip")
    for variable in ("PATH", "NVCC", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.delenv(PREBUILT, raising=False)
    packed = [linear.backend_for("cuda").pack([wide, many_bits]) for _ in range(2)]
    x = torch.randn(3, 256, device="cuda").half()
    assert error(linear.run_linear(x, packed[1]), expected(x, wide, many_bits)) < 2e-3
    said = [line for line in caplog.messages if "by torch" in line]
    assert len(said) == 2
    assert "2^9" in said[0] or "512 pairs" in said[0]
