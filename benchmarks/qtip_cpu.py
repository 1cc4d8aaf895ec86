"""Trellis-coded layers that stay packed on a CPU, beside the same decoded at load into bfloat16.

    python -m benchmarks.qtip_cpu [--threads 1] [--build avx512_bf16 | avx512 | avx2] [--codes mcg]

Microseconds of a layer. Every round times all ways one after the other, through copies of the
weights that no cache holds; a way's number is the least of its rounds, so that neighbours disturb
all alike. `as chosen` is what `Library.linear` takes. Last come nanoseconds of a core for 16
weights, decoded and multiplied for one token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import click
import torch
from torch.nn import functional

from batchinfer.native import compiled, cpu_flags, user_folder
from batchinfer.quantization.methods.qtip.codes import gaussian_tlut
from batchinfer.quantization.methods.qtip.cpu import KINDS, Layer, Library, pairs_of
from batchinfer.quantization.methods.qtip.packed import SOURCE, flags_for
from benchmarks.common import heading

SHAPES = ((2048, 2048), (4096, 14336))
TOKENS = (1, 4, 16, 64, 256, 1024)
BITS = (2, 4)
#: Flags that a build goes without.
WITHOUT = {
    "avx512_bf16": frozenset[str](),
    "avx512": frozenset({"avx512_bf16"}),
    "avx2": frozenset({"avx512f"}),
}
#: More than the third-level cache.
ROTATED_BYTES = 96 << 20
SECONDS = 2.5  # of rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--build", choices=WITHOUT, default="avx512_bf16")
    parser.add_argument("--codes", nargs="+", choices=KINDS, default=["mcg"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    flags = flags_for(cpu_flags() - WITHOUT[arguments.build])
    library = Library(compiled(SOURCE, flags, user_folder()))
    dtype = getattr(torch, arguments.dtype)
    click.echo(f"{heading()}; {arguments.threads} threads; {' '.join(flags)}; {dtype}\n")
    for code in arguments.codes:
        for shape in SHAPES:
            for bits in BITS:
                compare(library, code, bits, shape, dtype)
    click.echo("\n| code | bits | ns for 16 weights | GB/s of packed weights |\n|---|---|---|---|")
    for code in KINDS:
        for bits in BITS:
            nanoseconds = of_16_weights(library, code, bits)
            rate = 2 * bits / nanoseconds
            click.echo(f"| {code} | {bits} | {nanoseconds:.2f} | {rate:.1f} |")


def compare(
    library: Library, code: str, bits: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    num_in, num_out = shape
    packed = copies_of(code, bits, shape)
    num_bytes = num_in * num_out * dtype.itemsize
    decoded = [torch.randn(num_out, num_in, dtype=dtype) for _ in range(copies(num_bytes))]
    click.echo(
        f"{num_in} x {num_out}, {bits} bits {code}: {num_bytes / 1e6:.1f} MB decoded, "
        f"{packed[0].weights.nbytes / 1e6:.1f} MB packed"
    )
    click.echo("| tokens | decoded at load | as chosen | ratio | float32 | bfloat16 | slices |")
    click.echo("|---|---|---|---|---|---|---|")
    for tokens in TOKENS:
        x, y = torch.randn(tokens, num_in, dtype=dtype), torch.empty(tokens, num_out, dtype=dtype)
        ways: dict[str, list[Callable[[], object]]] = {
            "decoded": [partial(functional.linear, x, weight) for weight in decoded],
            "chosen": [partial(library.linear, x, layer, y) for layer in packed],
            "float32": [partial(library.multiply, x, layer, y) for layer in packed],
            "slices": [partial(library.multiply_dense, x, layer, y) for layer in packed],
        }
        if library.has_bfloat16 and dtype == torch.bfloat16:
            narrow = partial(library.multiply, dtype=torch.bfloat16)
            ways["bfloat16"] = [partial(narrow, x, layer, y) for layer in packed]
        found = least(ways)
        ratio = found["chosen"] / found["decoded"]
        words = [f"{found[name]:.0f}" for name in ("decoded", "chosen")] + [f"{ratio:.2f}"]
        words += [
            f"{found[n]:.0f}" if n in found else "" for n in ("float32", "bfloat16", "slices")
        ]
        click.echo(f"| {tokens} | {' | '.join(words)} |")


def copies(num_bytes: int) -> int:
    return -(-ROTATED_BYTES // num_bytes)


def copies_of(code: str, bits: int, shape: tuple[int, int]) -> list[Layer]:
    """Layers of random bits."""
    num_in, num_out = shape
    words = (num_out // 16, num_in // 16, 32 * bits)
    table = pairs_of(gaussian_tlut()) if code == "hyb" else None
    scales = (torch.ones(num_in), torch.full((num_out,), 1 / 64))
    count = copies(num_in * num_out * bits // 8)
    weights = [torch.randint(0, 256, words, dtype=torch.uint8) for _ in range(count)]
    return [Layer(own, *scales, code, table) for own in weights]


def least(ways: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """Microseconds of each way's calls: of one copy after the other, the least of the rounds."""
    found: dict[str, float] = {}
    next_of = dict.fromkeys(ways, 0)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or min(next_of.values()) < 3:
        for name, calls in ways.items():
            few = [calls[(next_of[name] + i) % len(calls)] for i in range(min(4, len(calls)))]
            next_of[name] += len(few)
            start = time.perf_counter()
            for call in few:
                call()
            taken = 1e6 * (time.perf_counter() - start) / len(few)
            found[name] = min(found.get(name, taken), taken)
    return found


def of_16_weights(library: Library, code: str, bits: int) -> float:
    """Nanoseconds on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layers = copies_of(code, bits, (4096, 2048))
    x, y = torch.randn(1, 4096), torch.empty(1, 2048)
    ways = {"one": [partial(library.multiply, x, layer, y) for layer in layers]}
    microseconds = least(ways)["one"]
    torch.set_num_threads(threads)
    return 1e3 * microseconds * 16 / (4096 * 2048)


if __name__ == "__main__":
    main()
