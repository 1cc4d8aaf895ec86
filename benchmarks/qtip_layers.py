"""Layers of random bits to measure the trellis kernels with, and whether those are right."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CHECKED_TOKENS = (1, 2, 3, 4, 8, 15, 16, 17, 63, 64, 65, 128, 144, 255, 257, 1024)
ROTATED_BYTES = 512 << 20


class Lines:
    def __init__(self, file: Path, section: str) -> None:
        self.file = file
        self.section = section

    def write(self, **fields: Any) -> None:
        line = json.dumps({"section": self.section, **fields})
        with self.file.open("a") as to:
            to.write(line + "\n")
        print(line, flush=True)  # noqa: T201


@cache
def hyb_table() -> Any:
    from batchinfer.quantization.methods.qtip.codes import gaussian_tlut

    return gaussian_tlut()


def random_layer(size_in: int, size_out: int, bits: int, code: str, order: str) -> tuple[Any, Any]:
    """A layer of random bits on the GPU, and its decoded weights [in, out] by the reference."""
    import torch

    from batchinfer.quantization.methods.qtip import codes, cuda, trellis

    shape = (size_in // 16, size_out // 16, 16 * bits)
    stored = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda")
    tlut = hyb_table() if code == "hyb" else None
    values = codes.table(code, tlut).cuda()
    coded = trellis.decode_tiles(stored, values, order)
    signs = torch.randint(0, 2, (size_in + size_out,), device="cuda") * 2.0 - 1.0
    scales = (signs * (0.5 + torch.rand(size_in + size_out, device="cuda"))).half()
    layer = cuda.Layer(
        weights=cuda.words_of(stored),
        suh=scales[:size_in],
        svh=scales[size_in:] / 64,
        counters=cuda.counters_for(size_out, torch.device("cuda"), max(TOKENS) // 8),
        code=code,
        bits=bits,
        table=None if tlut is None else tlut.cuda(),
        lane_order=order,
    )
    return layer, coded


def copies_of(shape: str, bits: int, code: str) -> list[Any]:
    """Layers of random bits, more than any cache holds."""
    import torch

    from batchinfer.quantization.methods.qtip import cuda

    size_in, size_out = SHAPES[shape]
    layer, _ = random_layer(size_in, 128, bits, code, "exl3")
    count = -(-ROTATED_BYTES // (size_in * size_out * bits // 8))
    whole = (count, size_out // 16, size_in // 128, 256 * bits)
    copies = torch.randint(0, 256, whole, dtype=torch.uint8, device="cuda")
    svh = torch.randn(size_out, device="cuda").half() / 64
    counters = cuda.counters_for(size_out, torch.device("cuda"), max(TOKENS) // 8)
    return [layer._replace(weights=w, svh=svh, counters=counters) for w in copies]


def run(lib: Any, x: Any, layer: Any, y: Any, bias: Any, variant: int | None) -> None:
    """By a kernel, or cuBLAS (cuda.DENSE), or as `linear` chooses (None)."""
    if variant is None:
        lib.linear(x, layer, y, bias)
    elif variant < 0:
        lib.multiply_dense(x, layer, y, bias)
    else:
        lib.multiply(x, layer, y, bias, variant)


def check(lines: Lines, lib: Any, bits: int, code: str, order: str) -> None:
    """Decoded weights bit for bit; products against float64."""
    import torch

    from batchinfer.quantization.methods.qtip import cuda
    from batchinfer.quantization.methods.qtip.hadamard import block_hadamard

    torch.manual_seed(0)
    for size_in, size_out in ((256, 128), (1152, 896), (4096, 1024)):
        layer, coded = random_layer(size_in, size_out, bits, code, order)
        found = lib.dense(layer, 0, size_out)
        as_bf16 = lib.dense(layer, 0, size_out, torch.bfloat16)
        same = torch.equal(found.T.contiguous(), coded) and torch.equal(as_bf16, found.bfloat16())
        lines.write(check="decode", shape=[size_in, size_out], equal=same)
        rotated = block_hadamard(block_hadamard(coded).T).double()
        weight = rotated * layer.suh.double() * layer.svh.double()[:, None]
        bias = torch.randn(size_out, device="cuda")
        worst: dict[str, float] = {}
        again = True
        for tokens, dtype in itertools.product(CHECKED_TOKENS, (torch.float16, torch.bfloat16)):
            x = torch.randn(tokens, size_in, device="cuda").to(dtype)
            by = bias.to(dtype)
            expected = x.double() @ weight.T + by.double()
            ways: dict[str, int | None] = {f"variant{i}": i for i in range(len(lib.variants))}
            for name, variant in {**ways, "dense": cuda.DENSE, "chosen": None}.items():
                y = torch.empty(tokens, size_out, dtype=dtype, device="cuda")
                run(lib, x, layer, y, by, variant)
                once = y.clone()
                run(lib, x, layer, y, by, variant)
                again &= torch.equal(once, y)
                # What rounding the output alone costs is not the kernel's.
                error = (y.double() - expected).norm() / expected.norm()
                key = f"{name}-{str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), float(error))
        limit = {"float16": 1e-3, "bfloat16": 4e-3}
        good = all(error <= limit[key.split("-")[1]] for key, error in worst.items())
        clean = not bool(layer.counters.any())
        lines.write(
            check="product", shape=[size_in, size_out], good=good, deterministic=again,
            counters_zero=clean, worst=worst,
        )  # fmt: skip
