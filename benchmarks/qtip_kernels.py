"""The trellis kernels on one GPU: whether they are right, and how fast beside others.

    python -m benchmarks.qtip_kernels build LIBRARIES           # needs nvcc, no GPU
    python -m benchmarks.qtip_kernels run LIBRARIES OUT.jsonl   # needs torch and a GPU, no compiler

Every section is a process of its own with a time limit, so that one that fails leaves the others.
Beside torch's bf16 product, and a kernel of ours that decodes again every 16 rows ("every16").
Times are of CUDA graphs that go through at least 512 MB of copies of the weights, so that no cache
holds them; the best of several replays, divided by the number of copies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CHECKED_TOKENS = (1, 2, 3, 4, 8, 15, 16, 17, 63, 64, 65, 128, 144, 255, 257, 1024)
CODES = ("mcg", "mul1", "hyb")
#: (bits, code, lane order) that are checked and not timed.
ALSO_CHECKED = [
    *((bits, code, "exl3") for bits in (1, 5, 6, 7, 8) for code in ("3inst", "mul1", "hyb")),
    *((bits, "1mad", "exl3") for bits in (1, 2, 4)),
    (2, "hyb", "qtip"),
    (3, "mcg", "qtip"),
]
ROTATED_BYTES = 512 << 20
#: Bytes a second, measurable; weights a second that the notes' counts of logic operations allow.
BYTE_ROOF = 4.3e12
ALU_ROOF = {"mcg": 3.7e12, "3inst": 3.7e12, "mul1": 7.4e12, "hyb": 9.9e12}


# ---------------------------------------------------------------- build


def build(folder: Path, chosen: list[tuple[int, str, str]]) -> None:
    from batchinfer.quantization.methods.qtip.cuda_backend import SOURCE, flags_for
    from batchinfer.quantization.native import CUDA, compiled

    def one(combination: tuple[int, str, str]) -> None:
        print(compiled(SOURCE, flags_for(*combination), folder, CUDA), flush=True)  # noqa: T201

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, dict.fromkeys(chosen)))


# ---------------------------------------------------------------- sections, each in a process


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
        counters=cuda.counters_for(size_out, torch.device("cuda"), max(TOKENS)),
        code=code,
        bits=bits,
        table=None if tlut is None else tlut.cuda(),
        lane_order=order,
    )
    return layer, coded


def check(lines: Lines, lib: Any, bits: int, code: str, order: str) -> None:
    """Decoded weights bit for bit; products against float64."""
    import torch

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
            ways = {f"variant{i}": i for i in range(len(lib.variants))}
            for name, variant in {**ways, "dense": -2}.items():
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


def run(lib: Any, x: Any, layer: Any, y: Any, bias: Any, variant: int) -> None:
    if variant == -2:
        lib.multiply_dense(x, layer, y, bias)
    else:
        lib.multiply(x, layer, y, bias, variant)


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
        layer, _ = random_layer(size_in, 128, bits, code, "exl3")
        groups = size_in // 128
        bytes_of = size_in * size_out * bits // 8
        count = -(-ROTATED_BYTES // bytes_of)
        whole = (count, size_out // 16, groups, 256 * bits)
        copies = torch.randint(0, 256, whole, dtype=torch.uint8, device="cuda")
        svh = torch.randn(size_out, device="cuda").half() / 64
        counters = cuda.counters_for(size_out, torch.device("cuda"), max(TOKENS))
        layers = [layer._replace(weights=w, svh=svh, counters=counters) for w in copies]
        weights = size_in * size_out
        floor = max(bytes_of / BYTE_ROOF, weights / ALU_ROOF[code])
        for tokens in TOKENS:
            if tokens > most_tokens:
                break
            x = torch.randn(tokens, size_in, device="cuda").bfloat16()
            y = torch.empty(tokens, size_out, dtype=torch.bfloat16, device="cuda")
            ways = {"fused": -1} if tokens <= 256 else {}
            if tokens > 16:
                ways["every16"] = 1
            if tokens >= 32:
                ways["dense"] = -2
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
    from batchinfer.quantization.methods.qtip.cuda_backend import library
    from batchinfer.quantization.native import PREBUILT

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
    yield from ((f"check:{k}:{code}:exl3", 60) for k, code in timed)
    yield "bf16", 60
    yield from ((f"speed:{k}:{code}:exl3", 60) for k, code in timed)
    yield f"serial:{bits[0]}:mcg:exl3", 45
    yield from ((f"check:{k}:{code}:{order}", 45) for k, code, order in ALSO_CHECKED)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("build", "run", "section"))
    parser.add_argument("libraries", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="sections whose names begin with this")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--timed-only", action="store_true", help="build nothing else")
    args = parser.parse_args()
    if args.what == "build":
        timed = [(bits, code, "exl3") for bits in args.bits for code in CODES]
        build(args.libraries, timed if args.timed_only else [*timed, *ALSO_CHECKED])
        return
    if args.what == "section":
        section(args.libraries, args.out, args.only)
        return
    end = time.monotonic() + args.seconds
    for name, limit in sections(args.bits):
        left = end - time.monotonic()
        if not name.startswith(args.only) or left < 10:
            continue
        command = [sys.executable, "-m", "benchmarks.qtip_kernels", "section"]
        command += [str(args.libraries), str(args.out), "--only", name]
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=min(limit, left), capture_output=True, text=True
            )
            tail, code = done.stderr[-1500:], done.returncode
        except subprocess.TimeoutExpired:
            tail, code = "", 124
        if code:
            Lines(args.out, name).write(rc=code, stderr=tail)


if __name__ == "__main__":
    main()
