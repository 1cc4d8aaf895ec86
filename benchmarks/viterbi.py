"""How well and how fast tiles of a unit Gaussian are coded (kernels/cpu/viterbi.cpp).

    python -m benchmarks.viterbi [--tiles 4096] [--cpu avx2] [--codes mcg hyb]

Mean squared error of a weight beside what is published, and weights per second of wall and of CPU
time, in each code at 2, 3 and 4 bits. --cpu compiles for lesser CPUs than this one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import click
import torch

from batchinfer.engine.hardware import cpu_flags
from batchinfer.making.cached import user_cache
from batchinfer.making.trellis.ldlq import Coder
from batchinfer.making.trellis.viterbi import search_on_cpu
from batchinfer.quantization.methods.qtip.codes import CODES, gaussian_tlut, table
from benchmarks.common import heading

FLAGS = {"avx2": frozenset({"avx2", "fma"}), "plain": frozenset[str]()}
#: Of 1MAD, in ExLlamaV3's measurements; the paper's for 2 bits is the same. HYB: the paper's.
PUBLISHED = {2: 0.0686, 3: 0.0178, 4: 0.0047}
PUBLISHED_HYB = {2: 0.0712, 3: 0.0193, 4: 0.0060}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiles", type=int, default=4096)
    parser.add_argument("--cpu", choices=FLAGS)
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES))
    arguments = parser.parse_args()
    flags = FLAGS[arguments.cpu] if arguments.cpu else cpu_flags()
    tiles = torch.randn(arguments.tiles, 256, generator=torch.Generator().manual_seed(0))
    click.echo(f"{heading()}; {arguments.tiles} tiles; {arguments.cpu or 'this CPU'}\n")
    click.echo("| code | bits | MSE | published | weights/s | of a core's time |")
    click.echo("|---|---|---|---|---|---|")
    for code in arguments.codes:
        for num_bits in (2, 3, 4):
            click.echo(measure(tiles, code, num_bits, flags, user_cache() / "libraries"))


def measure(
    tiles: torch.Tensor, code: str, num_bits: int, flags: frozenset[str], libraries: Path
) -> str:
    values = table(code, gaussian_tlut() if code == "hyb" else None).float()
    search = search_on_cpu(values, num_bits, flags, libraries)
    scale = Coder(search, values, num_bits).scale
    search(tiles[:8])
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    states = search(tiles * scale)
    took_s, took_cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    error = float((values[states.long()].flatten(1) - tiles * scale).pow(2).mean()) / scale**2
    published = (PUBLISHED_HYB if code == "hyb" else PUBLISHED)[num_bits]
    rates = f"{tiles.numel() / took_s:,.0f} | {tiles.numel() / took_cpu_s:,.0f}"
    return f"| {code} | {num_bits} | {error:.5f} | {published} | {rates} |"


if __name__ == "__main__":
    main()
