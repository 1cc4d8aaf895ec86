"""QTIP's codes, trellis and transforms are the definitions', bit for bit."""

from __future__ import annotations

import hashlib

import pytest
import torch

from batchinfer.quantization.methods.qtip import codes, trellis
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.hadamard import (
    block_hadamard,
    full_hadamard,
    sylvester,
)
from tests.support import qtip_reference as reference

pytestmark = pytest.mark.slow

#: Of the bytes of all 65,536 float16 numbers. A kernel that computes others is wrong.
HASHES = {
    "3inst": "ad88de2dcff5bb05",
    "mcg": "95383563929baa9d",
    "mul1": "bc48d02cb1c14939",
    "1mad": "5316aa8939b0cfd9",
    "hyb": "421dc8efa572e53d",
}
#: Root mean squares over all states (of `hyb`: what its table is scaled to).
RMS = {"3inst": 1.24371, "mcg": 1.24411, "mul1": 1.0003, "1mad": 1.0001, "hyb": 0.9682}


def a_tlut() -> torch.Tensor:
    """Exact everywhere, unlike `gaussian_tlut`."""
    numbers = torch.arange(1024).view(512, 2) * 37 % 1024
    return ((numbers - 512) / 256).half()


def random_tiles(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)


def is_circular(states: torch.Tensor, num_bits: int) -> bool:
    """Whether each state [..., 256 / V] shares its bits with the next, the last with the first."""
    num_kept = codes.STATE_BITS - num_bits * trellis.TILE_WEIGHTS // states.shape[-1]
    before = states.roll(-1, -1) >> (codes.STATE_BITS - num_kept)
    return torch.equal(before, states & ((1 << num_kept) - 1))


@pytest.mark.parametrize("code", codes.CODES)
def test_every_state_of_a_code_has_the_bits_of_its_definition(code: str) -> None:
    tlut = a_tlut() if code == "hyb" else None
    found = codes.table(code, tlut)
    rows = tlut.tolist() if tlut is not None else None
    expected = [reference.state_values(code, state, rows) for state in range(1 << 16)]
    assert found.tolist() == expected
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == HASHES[code]


@pytest.mark.parametrize("code", codes.CODES)
def test_a_code_has_the_root_mean_square_of_its_kind(code: str) -> None:
    tlut = codes.gaussian_tlut() if code == "hyb" else None
    assert codes.table(code, tlut).float().square().mean().sqrt() == pytest.approx(
        RMS[code], abs=1e-4
    )


@pytest.mark.parametrize(
    ("code", "tlut", "words"),
    [
        ("2inst", None, "known are"),
        ("hyb", None, "takes a table"),
        ("mcg", torch.zeros(512, 2).half(), "takes no table"),
        ("hyb", torch.zeros(500, 2).half(), "float16 \\[2\\^Q, 2\\]"),
        ("hyb", torch.zeros(512, 2), "not float32"),
    ],
)
def test_what_no_code_is_raises(code: str, tlut: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codes.table(code, tlut)


@pytest.mark.parametrize("num_values", [1, 2])
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_states_are_the_windows_of_the_stream(num_bits: int, num_values: int) -> None:
    """By both conventions; and what is unpacked, packs to the same bits."""
    tiles = random_tiles(3, 2, 16 * num_bits)
    states = trellis.unpack(tiles, num_values)
    started = trellis.states_of_stream(tiles, num_values, "start")
    step = num_bits * num_values
    for i, j in ((0, 0), (2, 1)):
        words = tiles[i, j].tolist()
        assert states[i, j].tolist() == reference.exl3_states(reference.exl3_bits(words), step)
        assert started[i, j].tolist() == reference.qtip_states(reference.plain_bits(words), step)
    assert is_circular(states, num_bits) and is_circular(started, num_bits)
    assert torch.equal(trellis.pack(states, num_bits), tiles)
    assert torch.equal(trellis.stream_of_states(started, num_bits, "start"), tiles)


@pytest.mark.parametrize("lane_order", trellis.LANE_ORDERS)
def test_every_position_of_a_sequence_has_its_place_in_the_tile(lane_order: str) -> None:
    sequences = torch.arange(2 * 3 * 256).view(2, 3, 256)
    matrix = trellis.from_sequences(sequences, lane_order)
    for position in range(256):
        of_in, of_out = reference.place(lane_order, position)
        assert matrix[16 + of_in, 32 + of_out] == sequences[1, 2, position]
    assert torch.equal(trellis.to_sequences(matrix, lane_order), sequences)


def test_hadamards_are_orthogonal_and_sylvesters() -> None:
    assert sylvester(128).tolist() == reference.hadamard(128)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block_hadamard(block_hadamard(x)), x)
    torch.testing.assert_close(block_hadamard(x[:, :128]), full_hadamard(x[:, :128]))
    odd = torch.ones(4, 4) - 2 * torch.eye(4)  # a Hadamard matrix that is not symmetric with rolls
    odd = odd.roll(1, 0)
    matrix = torch.kron(odd, sylvester(64)) / 16
    torch.testing.assert_close(full_hadamard(x, odd), x @ matrix.T)
    torch.testing.assert_close(full_hadamard(full_hadamard(x, odd), odd, inverse=True), x)
    with pytest.raises(ValueError, match="not a multiple of 128"):
        block_hadamard(x[:, :100])
    with pytest.raises(ValueError, match="power of two"):
        full_hadamard(x[:, :96])


def test_a_layer_is_its_tiles_between_signs_and_hadamards() -> None:
    """Also where it is decoded in several chunks, the last of which is shorter."""
    tiles = random_tiles(8, 40, 48)
    suh, svh = torch.randn(128), torch.randn(640)
    coded = trellis.decode_tiles(tiles, codes.table("mcg"), "exl3").double()
    matrix = torch.tensor(reference.hadamard(128)).double() / 128**0.5
    blocks = torch.block_diag(*[matrix] * 5)
    expected = (suh.double()[:, None] * (matrix @ coded @ blocks) * svh.double()).T
    found = dense(Coded(tiles, suh, svh, "mcg")).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
