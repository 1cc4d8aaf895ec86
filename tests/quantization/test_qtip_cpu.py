"""The CPU's kernels for packed weights, in each build: the reference's bits, and its products."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchinfer.native import NotCompiled, compiled, cpu_flags, why_none
from batchinfer.quantization.methods.base import KEEP_PACKED
from batchinfer.quantization.methods.qtip import cpu, cpu_backend, decided, linear, packed
from batchinfer.quantization.methods.qtip.codes import gaussian_tlut, table
from batchinfer.quantization.methods.qtip.cpu import KINDS, ORDERS, Layer, Library
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.loading import LayerPieces, Span
from batchinfer.quantization.methods.qtip.trellis import decode_tiles
from tests.support.libraries import kept_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of its imports
]

BUILDS = {
    "avx512_bf16": frozenset(
        {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_bf16"}
    ),
    "avx512": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vbmi2"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
TOKENS = (1, 3, 16, 33, 200)
#: Inputs of an odd number of blocks, outputs too.
SIZE_IN, SIZE_OUT = 384, 640
#: Error of a product beside its largest number: sums of float32; rounding of what comes out, and of
#: weights and activations where slices are decoded into bfloat16.
LIMITS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> Library:
    return Library(library_file(request.param))


def library_file(build: str) -> Path:
    if not BUILDS[build] <= cpu_flags():
        pytest.skip(f"this CPU has no {build}")
    try:
        return kept_library(packed.SOURCE, packed.flags_for(BUILDS[build]))
    except NotCompiled as error:
        pytest.skip(str(error))


@cache
def tlut() -> Tensor:
    return gaussian_tlut()


def random_coded(code: str, bits: int, lane_order: str = "exl3") -> Coded:
    generator = torch.Generator().manual_seed(bits)
    shape = (SIZE_IN // 16, SIZE_OUT // 16, 16 * bits)
    return Coded(
        torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator),
        torch.randn(SIZE_IN, generator=generator).half(),
        torch.randn(SIZE_OUT, generator=generator).half(),
        code,
        tlut() if code == "hyb" else None,
        lane_order,
    )


def layer_of(coded: Coded) -> Layer:
    tensors = cpu_backend.CpuBackend().laid_out([coded])
    weights, suh, svh, *tables = tensors
    return Layer(weights, suh, svh, coded.code, tables[0] if tables else None, coded.lane_order)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, SIZE_IN, generator=generator).to(dtype)


def rows_of(library: Library, coded: Coded, first: int, count: int) -> Tensor:
    """Decoded outputs [count, in]."""
    layer = layer_of(coded)
    found = torch.empty(count, layer.sizes[0])
    library.decode(layer, first, found)
    return found.unflatten(1, (-1, 2, 2, 4)).transpose(-1, -2).flatten(1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("code", KINDS)
def test_weights_are_the_references_bit_for_bit(library: Library, code: str, bits: int) -> None:
    """In both orders."""
    for lane_order in ORDERS:
        coded = random_coded(code, bits, lane_order)
        found = rows_of(library, coded, 128, 512)
        expected = decode_tiles(coded.trellis, table(code, coded.tlut), lane_order)
        assert torch.equal(found, expected.float().T[128:]), lane_order


def test_every_state_of_the_codes_that_round_is_the_references(library: Library) -> None:
    """All 2^16 of them, as the only ones of tiles whose bits repeat."""
    states = torch.arange(1 << 16).view(-1, 1)
    halves = torch.where(states >= 1 << 15, states - (1 << 16), states).to(torch.int16)
    # 8 bits a weight: every other state of a tile is the 16 bits, the others those across the seam.
    trellis = halves.expand(-1, 128).reshape(512, 128, 128)
    for code in KINDS:
        of_tlut = tlut() if code == "hyb" else None
        ones = (torch.ones(512 * 16), torch.ones(128 * 16))
        coded = Coded(trellis, *ones, code, of_tlut)
        found = rows_of(library, coded, 0, 128 * 16)
        expected = decode_tiles(trellis, table(code, of_tlut)).float().T
        assert torch.equal(found, expected), code


@pytest.mark.parametrize(("code", "bits"), [*product(KINDS, range(1, 9))])
def test_products_are_those_of_the_matrix_that_the_layer_represents(
    library: Library, code: str, bits: int
) -> None:
    """Any number of tokens, decoded within the kernel or in slices; inputs that are a view."""
    coded = random_coded(code, bits)
    weight, layer = dense(coded).double(), layer_of(coded)

    def in_bfloat16(x: Tensor, layer: Layer, y: Tensor) -> None:
        library.multiply(x, layer, y, torch.bfloat16)

    for tokens, dtype in product(TOKENS, LIMITS):
        wide = torch.cat([inputs(tokens, dtype), inputs(tokens, dtype)], 1)
        x = wide[:, :SIZE_IN]  # rows that are further apart than they are long
        expected = x.double() @ weight.T
        ways: list[Callable[[Tensor, Layer, Tensor], None]] = [
            library.multiply,
            library.multiply_dense,
        ]
        if library.has_bfloat16 and dtype == torch.bfloat16:
            ways.append(in_bfloat16)
        for multiply in ways:
            y = torch.full((tokens, SIZE_OUT + 128), torch.nan, dtype=dtype)
            multiply(x, layer, y[:, :SIZE_OUT])
            off = (y[:, :SIZE_OUT] - expected).abs().max() / expected.abs().max()
            assert off < LIMITS[dtype], (tokens, dtype, multiply.__name__)
            assert y[:, SIZE_OUT:].isnan().all(), "a write past the row"


def test_slices_of_outputs_are_put_together(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is smaller."""
    monkeypatch.setattr(cpu, "_DENSE_BYTES", 4 * SIZE_IN * 256)
    coded = random_coded("mcg", 2)
    x, y = inputs(5), torch.empty(5, SIZE_OUT)
    library.multiply_dense(x, layer_of(coded), y)
    torch.testing.assert_close(y, x @ dense(coded).T, rtol=1e-4, atol=1e-3)


def test_results_do_not_depend_on_threads_or_on_what_shares_a_step(library: Library) -> None:
    layer, x = layer_of(random_coded("mul1", 3)), inputs(33)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(torch.empty(33, SIZE_OUT))
            library.multiply(x, layer, found[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone = torch.empty(1, SIZE_OUT)
    for row in (0, 17, 32):
        library.multiply(x[row : row + 1], layer, alone)
        assert torch.equal(alone[0], found[0][row])


def test_without_torchs_threads_it_starts_its_own() -> None:
    """In a process that has no OpenMP."""
    file = library_file("avx2")
    script = f"""
import ctypes
lib = ctypes.CDLL({str(file)!r})
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
from batchinfer.native import cpu_flags
class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "suh", "svh", "table")] + [
        ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("bits", ctypes.c_int),
        ("code", ctypes.c_int), ("order", ctypes.c_int), ("multiplier", ctypes.c_uint32),
        ("addend", ctypes.c_uint32)]
weights = (ctypes.c_uint8 * (8 * 8 * 64))(*[i * 89 % 256 for i in range(8 * 8 * 64)])
layer = Layer(ctypes.addressof(weights), None, None, None, 128, 128, 2, 0, 0, 0xCBAC1FED, 0)
found = []
for threads in (1, 4):
    rows = (ctypes.c_float * (128 * 128))()
    lib.trellis_dense(ctypes.byref(layer), ctypes.c_int64(0), ctypes.c_int64(128), rows, 2, threads)
    found.append(bytes(rows))
assert found[0] == found[1] and len(set(found[0])) > 200
print("the same")
"""
    # Both bring OpenMP: vLLM preloads it once it ran here, and another CPU's stand-in has torch.
    others = ("LD_PRELOAD", "PYTHONPATH", "STAND_IN_CPU")
    environment = {k: v for k, v in os.environ.items() if k not in others}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "the same\n", done.stderr


def test_smaller_tables_are_the_upper_bits_of_the_index() -> None:
    if (reason := cpu_backend.why_none()) is not None:
        pytest.skip(reason)
    coded = random_coded("hyb", 2)._replace(tlut=gaussian_tlut(7))
    found = linear.run_linear(inputs(3), linear.backend_for("cpu").pack([coded]))
    torch.testing.assert_close(found, inputs(3) @ dense(coded).T, rtol=1e-4, atol=1e-3)


def test_a_cpu_decodes_at_load_unless_it_is_asked_and_able_to_keep_layers_packed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    coded = random_coded("mcg", 2)
    pieces = LayerPieces("a", Span(SIZE_IN, 0, SIZE_IN), [Span(SIZE_OUT, 0, SIZE_OUT)])

    def why(shard: Coded = coded, *, is_cpu: bool = True) -> str | None:
        return decided.why_decoded([shard], pieces, is_cpu=is_cpu, is_cut_within=False)

    monkeypatch.delenv(KEEP_PACKED, raising=False)
    monkeypatch.setattr(cpu_backend, "why_none", lambda: None)
    assert why() == "on a CPU"
    assert why(is_cpu=False) is None
    monkeypatch.setenv(KEEP_PACKED, "1")
    assert why() is None
    full = coded._replace(full_in=torch.ones(1, 1))
    assert why(full) == "on this CPU (the kernels know only Hadamards of 128)"
    monkeypatch.setattr(cpu_backend, "why_none", lambda: "there is no C++ compiler")
    reason = why()
    assert reason == "on this CPU (there is no C++ compiler)"
    decided.say_decoded.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            decided.say_decoded(reason, torch.bfloat16)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "(there is no C++ compiler) are decoded into bfloat16" in caplog.text


def test_a_compiler_is_named_with_arguments_as_make_takes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that is not there is not taken for it, by what is planned neither."""
    monkeypatch.delenv("BATCHINFER_KERNELS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, body in (("cache", 'shift; "$@"'), ("c+", "for last; do :; done; echo $1 > $last")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", "cache -q c+ -m64")
    source, folder = packed.SOURCE, tmp_path / "libraries"
    assert why_none(source, (), folder) is None
    assert compiled(source, (), folder).read_bytes().startswith(b"-m64\n")
    monkeypatch.setenv("CXX", "g++-99 -m64")
    assert "there is no C++ compiler" in (why_none(source, (), tmp_path / "other") or "")
    (tmp_path / "c+").rename(tmp_path / "g++")
    assert "'g++-99', which CXX names" in (why_none(source, (), tmp_path / "other") or "")
    monkeypatch.delenv("CXX")
    assert why_none(source, (), tmp_path / "other") is None


def test_a_folder_that_cannot_be_written_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "true")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "kernels", Path("/proc/sys")):
        with pytest.raises(NotCompiled, match=f"^{folder} cannot be written: "):
            compiled(packed.SOURCE, (), folder)


def test_a_cpu_without_the_instructions_or_a_compiler_gets_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packed.why_not_packed(frozenset({"avx2"})) == (
        "the kernels for packed weights need a CPU with avx2, fma, f16c"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("BATCHINFER_KERNELS", raising=False)
    assert "there is no C++ compiler" in (packed.why_not_packed(BUILDS["avx2"]) or "")


@pytest.mark.parametrize(
    ("dtype", "has_bfloat16", "expected"),
    [
        (torch.float32, True, "32 32 32 32 32 slices slices"),
        (torch.float16, True, "32 32 32 32 32 slices slices"),
        (torch.bfloat16, True, "32 16 16 16 16 slices slices"),
        (torch.bfloat16, False, "32 32 32 slices slices slices slices"),
    ],
)
def test_the_way_depends_on_tokens_and_on_what_the_cpu_multiplies(
    dtype: torch.dtype, has_bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As benchmarks/qtip_cpu.py showed to be fastest, or near it."""
    taken: list[str] = []

    def multiply(x: Tensor, layer: Layer, y: Tensor, dtype: torch.dtype = torch.float32) -> None:
        taken.append(str(8 * dtype.itemsize))

    library = Library.__new__(Library)
    library.has_bfloat16 = has_bfloat16
    monkeypatch.setattr(library, "multiply", multiply)
    monkeypatch.setattr(library, "multiply_dense", lambda x, layer, y: taken.append("slices"))
    for tokens in (1, 4, 16, 32, 255, 256, 4096):
        x = torch.empty(tokens, 1, dtype=dtype)
        library.linear(x, layer_of(random_coded("mcg", 2)), x)
    assert " ".join(taken) == expected
