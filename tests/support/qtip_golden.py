"""Writes the golden files of tests/data/qtip: tiny layers of each format, and what they decode to.

    python -m tests.support.qtip_golden tests/data/qtip

Random bits, decoded by `qtip_reference` alone: nothing here comes from the package. A file has the
tensors of its format as `layers.N.part`, and as `expected.N` some outputs of each layer's weight
[outputs, in], those of OUTPUTS. Hadamards mix all inputs and outputs of a block, so any tile, bit
or order that is read wrongly changes every number.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support import qtip_reference as reference

OUTPUTS = (0, 1, 37, 127)

Arrays = dict[str, np.ndarray]


def random_words(generator: random.Random, *shape: int) -> np.ndarray:
    words = [generator.randrange(1 << 16) for _ in range(int(np.prod(shape)))]
    return np.array(words, dtype=np.uint16).view(np.int16).reshape(shape)


def random_halves(generator: random.Random, size: int, centre: float) -> np.ndarray:
    values = [generator.choice((-1, 1)) * generator.uniform(0.5, 1.5) for _ in range(size)]
    return (np.array(values) * centre).astype(np.float16)


def random_tlut(generator: random.Random) -> np.ndarray:
    values = [[generator.gauss(0, 1) for _ in range(2)] for _ in range(512)]
    return np.array(values).astype(np.float16)


def end_layer(
    generator: random.Random, code: str, num_bits: int, lane_order: str, num_out: int = 128
) -> Arrays:
    """A layer in EXL3's tensors, with 128 inputs."""
    trellis = random_words(generator, 8, num_out // 16, 16 * num_bits)
    suh = random_halves(generator, 128, 1)
    svh = random_halves(generator, num_out, 0.02)
    tlut = random_tlut(generator) if code == "hyb" else None
    rows = None if tlut is None else tlut.tolist()
    step = num_bits * (2 if code == "hyb" else 1)
    tiles = {
        (i, j): reference.exl3_states(reference.exl3_bits(trellis[i, j].tolist()), step)
        for i in range(8)
        for j in range(num_out // 16)
    }
    coded = reference.coded_matrix(tiles, code, lane_order, rows)
    weight = reference.weight(coded, suh.tolist(), svh.tolist())
    layer = {"trellis": trellis, "suh": suh, "svh": svh, "expected": some(weight)}
    return layer if tlut is None else {**layer, "tlut": tlut}


def old_layer(generator: random.Random) -> Arrays:
    """EXL3 with signs as bits."""
    layer = end_layer(generator, "mcg", 2, "exl3")
    fields = {"su": layer.pop("suh"), "sv": layer.pop("svh")}
    tiles = {
        (i, j): reference.exl3_states(reference.exl3_bits(layer["trellis"][i, j].tolist()), 2)
        for i in range(8)
        for j in range(8)
    }
    coded = reference.coded_matrix(tiles, "mcg", "exl3")
    signs = {name: [1.0 if value > 0 else -1.0 for value in fields[name]] for name in fields}
    layer["expected"] = some(reference.weight(coded, signs["su"], signs["sv"]))
    for name, values in signs.items():
        words = [
            sum((values[16 * w + bit] < 0) << bit for bit in range(16))
            for w in range(len(values) // 16)
        ]
        layer[name] = np.array(words, dtype=np.uint16).view(np.int16)
    return layer


def relaxml_layer(
    generator: random.Random, num_bits: int, num_out: int, num_in: int, *, odd: Any = None
) -> Arrays:
    """As QTIP's own code writes one: HYB, Hadamards of whole sides, swizzled for its kernel."""
    num_tiles = num_out * num_in // 256
    trellis = random_words(generator, num_tiles, 16 * num_bits)
    tlut = random_tlut(generator)
    su = np.array([generator.choice((-1, 1)) for _ in range(num_in)]).astype(np.float16)
    sv = random_halves(generator, num_out, 0.02).astype(np.float32) * np.float32(1.0001)
    streams = reference.swizzled_bytes(trellis.tobytes(), num_out, num_in, num_bits)
    tiles = {
        (ni, mi): reference.qtip_states(bits, 2 * num_bits) for (mi, ni), bits in streams.items()
    }
    coded = reference.coded_matrix(tiles, "hyb", "qtip", tlut.tolist())
    weight = reference.weight(coded, su.tolist(), sv.tolist(), odd or [[1]], [[1]])
    return {
        "trellis": trellis,
        "SU": su,
        "SV": sv,
        "tlut": tlut,
        "rcp": np.array(0, dtype=np.int64),
        "tp_rank": np.array(8, dtype=np.int64),
        "expected": some(weight),
    }


def some(weight: list[list[float]]) -> np.ndarray:
    return np.array([weight[row] for row in OUTPUTS], dtype=np.float32)


def paley_12() -> list[list[int]]:
    """Paley's Hadamard matrix of 12 rows, of the squares modulo 11."""
    squares = {x * x % 11 for x in range(1, 11)}

    def jacobsthal(row: int, column: int) -> int:
        difference = (row - column) % 11
        return 0 if difference == 0 else 1 if difference in squares else -1

    # I + [[0, 1], [-1, Q]]
    rows = [[1] * 12]
    for row in range(11):
        rows.append([-1, *(jacobsthal(row, column) + (row == column) for column in range(11))])
    return rows


def write(folder: Path) -> None:
    generator = random.Random(13)
    folder.mkdir(parents=True, exist_ok=True)
    one = np.array(1, dtype=np.int32)
    exl3 = [
        end_layer(generator, "3inst", 3, "exl3"),
        end_layer(generator, "mcg", 2, "exl3") | {"mcg": one},
        end_layer(generator, "mul1", 5, "exl3") | {"mul1": one},
        old_layer(generator) | {"mcg": one},
    ]
    save(folder / "exl3.safetensors", exl3)
    ours = [("hyb", 3), ("1mad", 4), ("mul1", 1), ("mcg", 8)]
    for lane_order in ("exl3", "qtip"):
        layers = [end_layer(generator, code, bits, lane_order) for code, bits in ours]
        save(folder / f"qtip-{lane_order}.safetensors", layers)
    odd = paley_12()
    relaxml = [
        relaxml_layer(generator, 2, 256, 128),
        relaxml_layer(generator, 3, 128, 384, odd=odd),
    ]
    save(folder / "relaxml.safetensors", relaxml)
    matrix = np.array(odd, dtype=np.int8)
    assert (matrix.astype(int) @ matrix.T.astype(int) == 12 * np.eye(12, dtype=int)).all()
    save_file({"had_12": matrix}, folder / "hadamard.safetensors")
    (folder / "qtip.json").write_text(json.dumps(ours))


def save(file: Path, layers: list[Arrays]) -> None:
    tensors = {}
    for number, layer in enumerate(layers):
        tensors[f"expected.{number}"] = layer.pop("expected")
        tensors |= {f"layers.{number}.{part}": array for part, array in layer.items()}
    save_file(tensors, file)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
