"""The GPU's decoder, compiled for this machine: every bit as the reference has it."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import gaussian_tlut, table
from batchinfer.quantization.methods.qtip.cuda import (
    DENSE,
    KINDS,
    ORDERS,
    variant_for,
    words_of,
)
from batchinfer.quantization.methods.qtip.cuda_backend import balanced
from batchinfer.quantization.methods.qtip.trellis import decode_tiles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tests/support/qtip_host.cpp as a library."""
    to = tmp_path_factory.mktemp("host") / "host.so"
    source = ROOT / "tests" / "support" / "qtip_host.cpp"
    include = f"-I{ROOT / 'kernels' / 'cuda'}"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", include, str(source), "-o", str(to)],
        check=True,
    )
    return ctypes.CDLL(str(to))


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[Tensor, Tensor | None]]:
    tlut = gaussian_tlut()
    return {c: (table(c, tlut), tlut) if c == "hyb" else (table(c), None) for c in KINDS}


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_decodes_random_tiles_as_the_reference(
    decoder: Any, tables: dict[str, tuple[Tensor, Tensor | None]], num_bits: int
) -> None:
    """Each code in both lane orders."""
    generator = torch.Generator().manual_seed(num_bits)
    shape = (16, 8, 16 * num_bits)
    trellis = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
    for code, lane_order in itertools.product(KINDS, ORDERS):
        values, tlut = tables[code]
        expected = decode_tiles(trellis, values, lane_order)
        found = decoded(decoder, trellis, code, lane_order, tlut)
        assert np.array_equal(found, expected.numpy().view(np.uint16)), (code, lane_order)


def decoded(
    decoder: Any, trellis: Tensor, code: str, lane_order: str, tlut: Tensor | None
) -> NDArray[np.uint16]:
    """Bits of the float16 weights [in, out].

    Operand A of m16n8k16: register i of lane l has row l div 4 + 8 (i mod 2) and columns
    2 (l mod 4) + 8 (i div 2) and the next, of 16 outputs by 16 inputs.
    """
    size_in, size_out, num_bits = (16 * n for n in trellis.shape)
    num_bits //= 256

    packed = words_of(trellis).numpy()
    assert packed.shape == (size_out // 16, size_in // 128, 256 * num_bits)
    count = packed.shape[0] * packed.shape[1]
    found = np.zeros((*packed.shape[:2], 32, 8, 4), np.uint32)
    pairs = None if tlut is None else tlut.numpy().view(np.uint32).flatten()
    both = None if pairs is None else np.concatenate([pairs, pairs ^ 0x8000])
    kind, multiplier, addend = KINDS[code]
    decoder.decode(
        packed.ctypes.data_as(ctypes.c_void_p),
        *(count, num_bits, kind, ORDERS[lane_order]),
        *(ctypes.c_uint32(multiplier), ctypes.c_uint32(addend)),
        None if both is None else both.ctypes.data_as(ctypes.c_void_p),
        found.ctypes.data_as(ctypes.c_void_p),
    )
    # [out tile, group, lane row, lane column, tile, register column, register row, half]
    halves = found.view(np.uint16).reshape(*packed.shape[:2], 8, 4, 8, 2, 2, 2)
    return halves.transpose(1, 4, 5, 3, 7, 0, 6, 2).reshape(size_in, size_out)


@pytest.mark.parametrize(
    ("inputs", "outputs", "chosen"),
    [
        # What the H200's logs in benchmarks/results/ show to be fastest, or within a tenth of it.
        pytest.param(4096, 28672, [0, 0, 1, 2, 4, 5, 6, 7, 7, DENSE], id="gate and up"),
        pytest.param(14336, 4096, [0, 0, 1, 2, 3, 6, 6, 7, 7, DENSE], id="down"),
        pytest.param(4096, 6144, [0, 0, 1, 2, 3, 6, 6, 7, DENSE, DENSE], id="q, k and v"),
    ],
)
def test_the_way_depends_on_tokens_and_on_the_matrix(
    inputs: int, outputs: int, chosen: list[int]
) -> None:
    tokens = (1, 8, 16, 32, 64, 128, 192, 256, 512, 513)
    assert [variant_for(count, inputs, outputs) for count in tokens] == chosen


@pytest.mark.parametrize(("inputs", "outputs"), [(0.016, 1.0), (0.14, 0.2), (30.0, 1e-3), (1, 1)])
def test_scales_are_moved_to_where_float16_holds_small_inputs(
    inputs: float, outputs: float
) -> None:
    """By a power of two, so their product stays the same to the bit."""
    generator = torch.Generator().manual_seed(0)
    suh = (torch.randn(512, generator=generator).sign() * inputs * 1.1).half()
    svh = (torch.randn(256, generator=generator) * outputs).half()
    found_suh, found_svh = balanced(suh, svh)
    assert 0.5 <= found_suh.float().square().mean().sqrt() <= 2
    before, after = (
        one.double()[:, None] * other for one, other in ((suh, svh), (found_suh, found_svh))
    )
    large = svh.abs() > 0.02 * outputs
    assert torch.equal(before[:, large], after[:, large])


def test_scales_that_cannot_be_moved_stay_numbers() -> None:
    tiny = torch.full((128,), 2.0**-14).half()
    assert torch.equal(balanced(torch.full((128,), 1e-3).half(), tiny)[1], tiny)
    none = torch.zeros(128).half()
    assert torch.equal(balanced(none, tiny)[0], none)
    huge = torch.full((128,), 40_000.0).half()
    assert balanced(torch.full((128,), 100.0).half(), huge)[1].isfinite().all()
