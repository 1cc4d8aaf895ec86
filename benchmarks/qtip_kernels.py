"""The trellis kernels on one GPU: whether they are right, and how fast beside others.

    python -m benchmarks.qtip_kernels build LIBRARIES           # needs nvcc, no GPU
    python -m benchmarks.qtip_kernels run LIBRARIES OUT.jsonl   # needs torch and a GPU, no compiler
    python -m benchmarks.qtip_kernels report LOG.jsonl ...      # tables for kernels/README.md
    ncu ... python -m benchmarks.qtip_kernels profile LIBRARIES

Every section is a process of its own with a time limit, so that one that fails leaves the others.
Beside torch's bf16 product, and a kernel of ours that decodes again every 16 rows ("every16").
Times are of CUDA graphs that go through at least 512 MB of copies of the weights, so that no cache
holds them; the best of several replays, divided by the number of copies.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.qtip_layers import (
    ROTATED_BYTES,
    SHAPES,
    TOKENS,
    Lines,
    check,
    copies_of,
    run,
)
from benchmarks.qtip_report import report

ROOT = Path(__file__).parents[1]
EVERY16 = 1  # number of the kernel that decodes again for each 16 tokens
CODES = ("mcg", "mul1", "hyb")
#: (bits, code, lane order) that are checked and not timed.
ALSO_CHECKED = [
    *((bits, code, "exl3") for bits in (1, 5, 6, 7, 8) for code in ("3inst", "mul1", "hyb")),
    *((bits, "1mad", "exl3") for bits in (1, 2, 4)),
    (2, "hyb", "qtip"),
    (3, "mcg", "qtip"),
]
#: Bytes a second, measurable; weights a second that the notes' counts of logic operations allow.
BYTE_ROOF = 4.3e12
#: 132 SMs x 64 logic operations at 1.98 GHz, of which a weight needs 4, 4, 2 and 1.5.
ALU_ROOF = {"mcg": 4.18e12, "3inst": 4.18e12, "mul1": 8.36e12, "hyb": 11.2e12}


# ---------------------------------------------------------------- build


def build(folder: Path, chosen: list[tuple[int, str, str]]) -> None:
    from batchinfer.native import CUDA, compiled
    from batchinfer.quantization.methods.qtip.cuda_backend import SOURCE, flags_for

    def one(combination: tuple[int, str, str]) -> None:
        print(compiled(SOURCE, flags_for(*combination), folder, CUDA), flush=True)  # noqa: T201

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, dict.fromkeys(chosen)))


# ---------------------------------------------------------------- sections, each in a process


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call, of all of them in a CUDA graph; the best of five replays."""
    import torch

    for _ in range(2):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / len(calls))
    return best


def speed(lines: Lines, lib: Any, bits: int, code: str, most_tokens: int = 1024) -> None:
    import torch

    from batchinfer.quantization.methods.qtip import cuda

    for name, (size_in, size_out) in SHAPES.items():
        layers = copies_of(name, bits, code)
        weights = size_in * size_out
        bytes_of = weights * bits // 8
        floor = max(bytes_of / BYTE_ROOF, weights / ALU_ROOF[code])
        for tokens in TOKENS:
            if tokens > most_tokens:
                break
            x = torch.randn(tokens, size_in, device="cuda").bfloat16()
            y = torch.empty(tokens, size_out, dtype=torch.bfloat16, device="cuda")
            ways: dict[str, int | None] = {"chosen": None}
            if 16 < tokens <= 512:
                ways["every16"] = EVERY16
            if tokens >= 128:
                ways["dense"] = cuda.DENSE
            for way, variant in ways.items():
                calls = [partial(run, lib, x, layer, y, None, variant) for layer in layers]
                seconds = graph_seconds(calls)
                lines.write(
                    shape=name, tokens=tokens, way=way, us=seconds * 1e6,
                    gb_per_s=bytes_of / seconds / 1e9, weights_per_s=weights / seconds,
                    share_of_floor=floor / seconds, share_of_bytes=bytes_of / BYTE_ROOF / seconds,
                )  # fmt: skip
        # Decoding alone, into the same cache-sized slices.
        part = min(size_out, (24 << 20) // (2 * size_in) // 128 * 128)
        seconds = graph_seconds([partial(lib.dense, layer, 0, part) for layer in layers])
        lines.write(shape=name, way="decode", us=seconds * 1e6,
                    weights_per_s=size_in * part / seconds)  # fmt: skip


def variants(lines: Lines, lib: Any, bits: int, code: str) -> None:
    """Each kernel at each number of tokens that it takes at once."""
    import torch

    for name in ("gate_up", "o"):
        layers, (size_in, size_out) = copies_of(name, bits, code), SHAPES[name]
        for tokens in (8, 16, 32, 48, 64, 96, 128, 192, 256):
            x = torch.randn(tokens, size_in, device="cuda").bfloat16()
            y = torch.empty(tokens, size_out, dtype=torch.bfloat16, device="cuda")
            for variant, most in enumerate(lib.variants):
                if tokens <= most:
                    calls = [partial(run, lib, x, layer, y, None, variant) for layer in layers]
                    us = graph_seconds(calls) * 1e6
                    lines.write(shape=name, tokens=tokens, variant=variant, most=most, us=us)


def profile(libraries: Path) -> None:
    """A call of each kernel for `ncu`, of weights that no cache holds."""
    import torch

    os.environ["BATCHINFER_KERNELS"] = str(libraries)
    from batchinfer.quantization.methods.qtip.cuda_backend import library

    for code, tokens in itertools.product(("mcg", "hyb"), (1, 16, 64, 256)):
        layers, (size_in, size_out) = copies_of("gate_up", 2, code), SHAPES["gate_up"]
        x = torch.randn(tokens, size_in, device="cuda").bfloat16()
        y = torch.empty(tokens, size_out, dtype=torch.bfloat16, device="cuda")
        library(2, code, "exl3").linear(x, layers[0], y)
        torch.cuda.synchronize()


def speed_bf16(lines: Lines) -> None:
    import torch

    for name, (size_in, size_out) in SHAPES.items():
        count = -(-ROTATED_BYTES // (2 * size_in * size_out))
        copies = torch.randn(count, size_out, size_in, device="cuda", dtype=torch.bfloat16)
        for tokens in TOKENS:
            x = torch.randn(tokens, size_in, device="cuda").bfloat16()
            y = torch.empty(tokens, size_out, dtype=torch.bfloat16, device="cuda")
            seconds = graph_seconds([partial(torch.mm, x, w.T, out=y) for w in copies])
            lines.write(shape=name, tokens=tokens, way="bf16", us=seconds * 1e6,
                        gb_per_s=2 * size_in * size_out / seconds / 1e9)  # fmt: skip


def machine(lines: Lines) -> None:
    import torch

    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    seconds = graph_seconds([partial(to.copy_, source)] * 4)
    read = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").view(torch.int64)
    reading = graph_seconds([read.max] * 4)
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True
    )
    lines.write(
        name=properties.name, sms=properties.multi_processor_count, torch=torch.__version__,
        copy_tb_per_s=2 * (1 << 31) / seconds / 1e12, read_tb_per_s=(1 << 31) / reading / 1e12,
        smi=said.stdout,
    )  # fmt: skip


def section(libraries: Path, out: Path, name: str) -> None:
    from batchinfer.native import PREBUILT
    from batchinfer.quantization.methods.qtip.cuda_backend import library

    os.environ[PREBUILT] = str(libraries)
    lines = Lines(out, name)
    kind, *rest = name.split(":")
    started = time.monotonic()
    try:
        if kind == "machine":
            machine(lines)
        elif kind == "bf16":
            speed_bf16(lines)
        else:
            bits, code, order = int(rest[0]), rest[1], rest[2]
            lib = library(bits, code, order)
            if kind == "check":
                check(lines, lib, bits, code, order)
            elif kind == "variants":
                variants(lines, lib, bits, code)
            elif kind == "speed":
                speed(lines, lib, bits, code)
            else:  # each kernel waits for the one before it, as without the overlap of launches
                lib.overlap(False)
                speed(lines, lib, bits, code, 16)
        lines.write(done=True, seconds=time.monotonic() - started)
    except Exception as error:
        lines.write(failed=f"{type(error).__name__}: {error}"[:1000])
        raise


def sections(bits: list[int]) -> Iterator[tuple[str, int]]:
    """(name, seconds it may take), what matters most first."""
    timed = [(k, code) for k in bits for code in CODES]
    yield "machine", 60
    yield from ((f"check:{k}:{code}:exl3", 30) for k, code in timed)
    yield "bf16", 60
    yield from ((f"speed:{k}:{code}:exl3", 60) for k, code in timed)
    yield from ((f"variants:{bits[0]}:{code}:exl3", 60) for code in ("mcg", "hyb"))
    yield f"serial:{bits[0]}:mcg:exl3", 45
    yield from ((f"check:{k}:{code}:{order}", 45) for k, code, order in ALSO_CHECKED)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("build", "run", "section", "profile", "report"))
    parser.add_argument("libraries", type=Path)
    parser.add_argument("out", type=Path, nargs="*")
    parser.add_argument("--only", default="", help="sections whose names begin with this")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--timed-only", action="store_true", help="build nothing else")
    args = parser.parse_args()
    if args.what == "build":
        timed = [(bits, code, "exl3") for bits in args.bits for code in CODES]
        build(args.libraries, timed if args.timed_only else [*timed, *ALSO_CHECKED])
        return
    if args.what == "report":
        print(report([args.libraries, *args.out]))  # noqa: T201
        return
    if args.what == "profile":
        profile(args.libraries)
        return
    if args.what == "section":
        section(args.libraries, args.out[0], args.only)
        return
    end = time.monotonic() + args.seconds
    for name, limit in sections(args.bits):
        left = end - time.monotonic()
        if not name.startswith(args.only) or left < 10:
            continue
        command = [sys.executable, "-m", "benchmarks.qtip_kernels", "section"]
        command += [str(args.libraries), str(args.out[0]), "--only", name]
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=min(limit, left), capture_output=True, text=True
            )
            tail, code = done.stderr[-1500:], done.returncode
        except subprocess.TimeoutExpired:
            tail, code = "", 124
        if code:
            Lines(args.out[0], name).write(rc=code, stderr=tail)


if __name__ == "__main__":
    main()
