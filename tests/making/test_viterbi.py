"""The search of the nearest walk through a trellis: exact, tail-biting, as good as published."""

from __future__ import annotations

import logging
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchinfer.making.trellis.viterbi import NativeSearch, Search, TorchSearch, search_on_cpu
from batchinfer.native import NotCompiled, compiled, cpu_flags, instruction_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of its imports
]

#: What the compiler is told -> what the CPU needs for it.
BUILDS = {
    "avx512": frozenset({"avx512f", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma"}),
    "plain": frozenset[str](),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


def library(build: str, folder: Path) -> Path:
    if not BUILDS[build] <= cpu_flags():
        pytest.skip(f"this CPU has no {build}")
    return compiled("cpu/viterbi.cpp", instruction_flags(BUILDS[build]), folder)


def search_of(kind: str, table: Tensor, num_bits: int, folder: Path) -> Search:
    if kind == "torch":
        return TorchSearch(table, num_bits)
    return NativeSearch(table, num_bits, library(kind, folder), num_threads=2)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(tiles: Tensor, states: Tensor, table: Tensor) -> Tensor:
    """Squared distance of each tile [n, T] from its walk [n, T / V]."""
    return ((table[states.long()].flatten(1) - tiles) ** 2).sum(1).double()


def all_walks(state_bits: int, step_bits: int, num_steps: int) -> Tensor:
    """Every tail-biting walk: [2^(steps x step_bits), steps]. Longer than a state."""
    num_bits = step_bits * num_steps
    assert num_bits >= state_bits
    walks = []
    for bits in product((0, 1), repeat=num_bits):
        ends = [(i + 1) * step_bits for i in range(num_steps)]
        windows = [
            [bits[(end - state_bits + j) % num_bits] for j in range(state_bits)] for end in ends
        ]
        walks.append([int("".join(map(str, window)), 2) for window in windows])
    return torch.tensor(walks)


@pytest.mark.parametrize("kind", [*BUILDS, "torch"])
@pytest.mark.parametrize(
    ("state_bits", "num_bits", "num_values", "num_steps"),
    [
        (4, 1, 1, 6),
        (4, 2, 1, 4),
        (4, 1, 2, 4),
        (4, 2, 2, 2),
        (6, 1, 1, 10),
        (7, 1, 1, 9),
        (8, 2, 1, 5),
    ],
)
def test_the_walk_is_the_nearest_of_all_that_cross_the_seam_with_its_bits(
    kind: str, state_bits: int, num_bits: int, num_values: int, num_steps: int, libraries: Path
) -> None:
    """Against every tail-biting walk there is."""
    step_bits = num_bits * num_values
    table = gaussian(1 << state_bits, num_values)
    tiles = gaussian(40, num_steps * num_values, seed=1)
    states = search_of(kind, table, num_bits, libraries)(tiles)
    walks = all_walks(state_bits, step_bits, num_steps)
    costs = ((table[walks].flatten(1)[None] - tiles[:, None]) ** 2).sum(2).double()
    seams = walks[:, 0] >> step_bits
    for tile, walk in enumerate(states):
        of_seam = costs[tile][seams == walk[0] >> step_bits]
        assert cost(tiles[[tile]], states[[tile]], table).item() == pytest.approx(
            of_seam.min().item(), rel=1e-4
        )
    assert {tuple(walk) for walk in states.tolist()} <= {tuple(walk) for walk in walks.tolist()}


def least_cost(tile: Tensor, table: Tensor, num_bits: int) -> float:
    """Of all tail-biting walks, by a search for each possible seam."""
    low = len(table) >> num_bits
    costs = []
    for seam in range(low):
        least = torch.full((low,), torch.inf)
        least[seam] = 0
        for wanted in tile:
            all_states = (table[:, 0] - wanted) ** 2 + least.repeat_interleave(1 << num_bits)
            least = all_states.view(-1, low).amin(0)
        costs.append(least[seam].item())
    return min(costs)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_the_seam_that_the_first_pass_finds_costs_almost_nothing(
    kind: str, libraries: Path
) -> None:
    table = gaussian(1 << 8, 1)
    tiles = gaussian(12, 128, seed=3)
    states = search_of(kind, table, 2, libraries)(tiles)
    best = sum(least_cost(tile, table, 2) for tile in tiles)
    assert best - 1e-3 <= cost(tiles, states, table).sum().item() <= 1.01 * best


@cache
def in_torch(num_bits: int, num_values: int) -> Tensor:
    """States of the first tile of the next test."""
    table = gaussian(1 << 16, num_values)
    return TorchSearch(table, num_bits)(gaussian(5, 32, seed=num_bits)[:1])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("num_values", [1, 2])
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_every_rate_is_tail_biting_and_costs_what_torch_finds(
    build: str, num_values: int, num_bits: int, libraries: Path
) -> None:
    """States of 16 bits; as many tiles as leave a group that is not whole."""
    table = gaussian(1 << 16, num_values)
    tiles = gaussian(5, 32, seed=num_bits)
    states = search_of(build, table, num_bits, libraries)(tiles)
    step_bits = num_bits * num_values
    kept = (1 << (16 - step_bits)) - 1
    assert torch.equal(states >> step_bits, states.roll(1, 1) & kept)
    assert states.min() >= 0 and states.max() < 1 << 16
    expected = cost(tiles[:1], in_torch(num_bits, num_values), table)
    assert cost(tiles[:1], states[:1], table).item() == pytest.approx(expected.item(), rel=1e-3)
    alone = search_of(build, table, num_bits, libraries)(tiles[-1:])
    assert torch.equal(alone, states[-1:])


@pytest.mark.parametrize(("num_bits", "distortion"), [(2, 0.0686), (3, 0.0177), (4, 0.0047)])
def test_a_gaussian_is_coded_as_well_as_the_paper_says(
    num_bits: int, distortion: float, libraries: Path
) -> None:
    """Of 96 tiles; `python -m benchmarks.viterbi` has 4,096 of them for each code."""
    table = gaussian(1 << 16, 1)
    scale = {2: 0.95, 3: 0.9, 4: 0.85}[num_bits]
    tiles = gaussian(96, 256, seed=2)
    states = search_on_cpu(table, num_bits, cpu_flags(), libraries)(tiles * scale)
    found = cost(tiles * scale, states, table).mean().item() / 256 / scale**2
    assert found == pytest.approx(distortion, rel=0.06)


def test_no_tiles_give_no_walks(libraries: Path) -> None:
    table = gaussian(1 << 16, 1)
    for kind in ("plain", "torch"):
        assert search_of(kind, table, 2, libraries)(torch.empty(0, 256)).numel() == 0


# Where nothing can be compiled.


def test_without_a_compiler_torch_searches_and_one_line_says_so(
    libraries: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, "batchinfer.making"):
        search = search_on_cpu(gaussian(1 << 6, 1), 1, cpu_flags(), tmp_path / "libraries")
    assert isinstance(search, TorchSearch)
    (line,) = caplog.messages
    assert "no C++ compiler" in line and "torch" in line
    assert not (tmp_path / "libraries").exists()


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/usr/bin/false")
    with pytest.raises(NotCompiled, match=r"^/usr/bin/false fails"):
        compiled("cpu/viterbi.cpp", (), tmp_path)


def test_a_named_compiler_that_is_not_there_is_named_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    said = r"^there is no C\+\+ compiler 'no-such-compiler', which CXX names,"
    with pytest.raises(NotCompiled, match=said):
        compiled("cpu/viterbi.cpp", (), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_library_is_compiled_once_for_each_set_of_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compiled("cpu/viterbi.cpp", ("-O0",), tmp_path)
    written = plain.stat().st_mtime_ns
    assert compiled("cpu/viterbi.cpp", ("-O0",), tmp_path) == plain
    assert plain.stat().st_mtime_ns == written
    assert compiled("cpu/viterbi.cpp", ("-O1",), tmp_path) != plain
    assert len(list(tmp_path.iterdir())) == 2


def test_a_library_that_was_compiled_elsewhere_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compiled("cpu/viterbi.cpp", ("-O0",), tmp_path / "elsewhere")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("BATCHINFER_KERNELS", str(tmp_path / "elsewhere"))
    assert compiled("cpu/viterbi.cpp", ("-O0",), tmp_path / "here") == library
    assert not (tmp_path / "here").exists()
    with pytest.raises(NotCompiled):
        compiled("cpu/viterbi.cpp", ("-O1",), tmp_path / "here")


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_library_that_was_cut_off_is_compiled_again(damage: bytes | None, tmp_path: Path) -> None:
    """Loaded, it ends the process."""
    library = compiled("cpu/viterbi.cpp", ("-O0",), tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[:-4000] if damage is None else damage)
    assert compiled("cpu/viterbi.cpp", ("-O0",), tmp_path) == library
    assert library.stat().st_size == len(whole)


def test_the_instruction_set_is_the_best_that_the_cpu_has() -> None:
    assert instruction_flags(BUILDS["avx512"]) == ("-mavx512f",)
    assert instruction_flags(BUILDS["avx2"]) == ("-mavx2", "-mfma")
    assert instruction_flags(frozenset({"avx2"})) == instruction_flags(frozenset()) == ()
