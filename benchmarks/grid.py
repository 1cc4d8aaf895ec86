"""`batchinfer run` as shipped beside one `LLM.generate`, on shapes of prompts and completions.

    python -m benchmarks.grid --log FILE [--shapes 128/128 ...] [--ways run ...] [--fp8]
    python -m benchmarks.grid --report FILE ...

A model of Llama-3.1-8B's shape with dummy weights (speed only: its tokens are random) on one GPU.
A shape is input/output tokens, all completions as long as asked, but for `skewed` (lognormal
prompts, a completion ends at the first of 855 tokens) and `shared` (16 documents of 1,536 tokens,
each with 128 own tokens, shuffled). Temperature 1, logprobs 1, prompts as token ids. `LLM` has its
own defaults, its engine in a process of its own among them; then its engine in our process, and
there with the graphs that batchinfer captures. It loads once for all shapes and is warmed by a call
of 64 rows. `batchinfer run` goes from Parquet to Parquet in a process for each shape. Rates are
completion tokens a second of generating. --cold runs one shape first with caches that are empty:
`LLM.generate` without a warm-up, and `batchinfer run`. Lines go to --log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import ROOT, machine, versions
from benchmarks.gpu import STOP_TOKEN_IDS, Record, run_job, write_model

MAX_MODEL_LEN = 4096
#: Where compiled code is kept; other folders are cold.
CACHES = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor",
          "TRITON_CACHE_DIR": "triton"}  # fmt: skip
GENERATE, RUN = "LLM.generate", "batchinfer run"
IN_PROCESS = f"{GENERATE} in our process"
SAME_GRAPHS = f"{IN_PROCESS}, graphs to 1024"
WAYS = ("generate", "in-process", "run", "same-graphs")
FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8"}


@dataclass(frozen=True, slots=True)
class Shape:
    """So many rows that most steps are full."""

    num_rows: int
    num_in: int
    num_out: int
    is_skewed: bool = False
    num_shared: int = 0

    def prompts(self) -> list[np.ndarray]:
        """Token ids, int32 [tokens] each."""
        rng = np.random.default_rng(0)
        if self.is_skewed:
            lengths = rng.lognormal(np.log(self.num_in), 0.7, self.num_rows)
            sizes = np.clip(lengths, 32, 2048).astype(int)
            return [_tokens(rng, size) for size in sizes]
        documents = [_tokens(rng, self.num_shared) for _ in range(16)]
        chosen = rng.integers(len(documents), size=self.num_rows)
        own = self.num_in - self.num_shared
        return [np.concatenate([documents[which], _tokens(rng, own)]) for which in chosen]

    def sampling(self) -> dict[str, Any]:
        stops = {"stop_token_ids": STOP_TOKEN_IDS} if self.is_skewed else {}
        return {"max_tokens": self.num_out, "temperature": 1.0, "ignore_eos": True, **stops}


SHAPES = {
    "128/128": Shape(6144, 128, 128),
    "128/512": Shape(2048, 128, 512),
    "128/2048": Shape(512, 128, 2048),
    "1000/1000": Shape(512, 1000, 1000),
    "2048/128": Shape(768, 2048, 128),
    "skewed": Shape(2048, 256, 512, is_skewed=True),
    "shared": Shape(2048, 1664, 64, num_shared=1536),
}


def _tokens(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(10, 128_000, size, dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--cold", choices=SHAPES)
    parser.add_argument("--fp8", action="store_true", help="weights and KV cache")
    parser.add_argument("--seconds", type=float, default=3600, help="nothing is begun after them")
    parser.add_argument("--report", nargs="+", type=Path)
    parser.add_argument("--generate", type=json.loads, help=argparse.SUPPRESS)  # one LLM, here
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return

    def record(test: str, **result: Any) -> None:
        line = json.dumps({"test": test, **result})
        click.echo(line)
        with arguments.log.open("a") as log:
            log.write(line + "\n")

    if arguments.generate:
        generate_all(record=record, **arguments.generate)
        return
    import torch

    record("machine", device=torch.cuda.get_device_name(), **machine(), **versions())
    with tempfile.TemporaryDirectory(prefix="batchinfer-grid-") as name:
        measure(Path(name), arguments, record)


def measure(folder: Path, arguments: argparse.Namespace, record: Record) -> None:
    end = time.monotonic() + arguments.seconds
    write_model(folder / "model")
    names = list(dict.fromkeys([*([arguments.cold] if arguments.cold else []), *arguments.shapes]))
    for name in names:
        write_prompts(folder / name.replace("/", "x"), SHAPES[name])
    model = FP8 if arguments.fp8 else {}
    words = ", fp8" if arguments.fp8 else ""

    def generate(what: str, shapes: list[str], **how: Any) -> None:
        how |= {"folder": str(folder), "what": what + words, "shapes": shapes}
        how["options"] = model | how.get("options", {})
        command = [sys.executable, "-m", "benchmarks.grid", "--log", str(arguments.log)]
        command += ["--generate", json.dumps(how)]
        left = max(1.0, end - time.monotonic())
        try:
            subprocess.run(command, cwd=ROOT, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            record(what + words, stopped="out of time")

    def run(what: str, shape: str) -> None:
        if time.monotonic() < end:
            job = job_of(folder, shape, model)
            record(what + words, shape=shape, **run_job(folder, job))

    if arguments.cold:
        with cold_caches(folder / "cold-generate"):
            generate(f"{GENERATE}, cold", [arguments.cold], is_warmed=False, has_own_process=True)
        with cold_caches(folder / "cold-run"):
            run(f"{RUN}, cold", arguments.cold)
    for way in arguments.ways:
        if way == "generate":
            generate(GENERATE, arguments.shapes, has_own_process=True)
        elif way == "in-process":
            generate(IN_PROCESS, arguments.shapes)
        elif way == "same-graphs":
            generate(SAME_GRAPHS, arguments.shapes, options={"max_cudagraph_capture_size": 1024})
        else:
            for shape in arguments.shapes:
                run(RUN, shape)


@contextmanager
def cold_caches(folder: Path) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ |= {name: str(folder / part) for name, part in CACHES.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def write_prompts(folder: Path, shape: Shape) -> None:
    """In four shards."""
    folder.mkdir()
    rows = shape.prompts()
    for index in range(4):
        part = rows[index * len(rows) // 4 : (index + 1) * len(rows) // 4]
        offsets = np.cumsum([0, *map(len, part)]).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(part)))
        pq.write_table(pa.table({"prompt": column}), folder / f"p{index}.parquet")


def job_of(folder: Path, shape: str, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "llama-8b-shape",
        "input": {"path": str(folder / shape.replace("/", "x") / "*.parquet")},
        "prompt": {"token_ids_column": "prompt"},
        "model": {"path": str(folder / "model"), "max_model_len": MAX_MODEL_LEN, **model},
        "sampling": {**SHAPES[shape].sampling(), "logprobs": 1},
        "engine": {"devices": 1, "options": {"load_format": "dummy"}},
        "output": {"path": str(folder / f"out-{time.time_ns()}")},
    }


def generate_all(
    record: Record,
    *,
    folder: str,
    what: str,
    shapes: list[str],
    options: dict[str, Any],
    is_warmed: bool = True,
    has_own_process: bool = False,
) -> None:
    """`LLM.generate` of each shape in turn."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(has_own_process))
    from vllm import LLM, SamplingParams

    begun = time.monotonic()
    llm = LLM(
        str(Path(folder) / "model"),
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        disable_log_stats=False,
        **options,
    )
    record(what, started_s=round(time.monotonic() - begun, 1))
    for name in shapes:
        shape = SHAPES[name]
        params = SamplingParams(**shape.sampling())
        params.detokenize = False
        params.logprobs = 1
        column = pq.read_table(Path(folder) / name.replace("/", "x")).column("prompt")
        prompts = [{"prompt_token_ids": row} for row in column.to_pylist()]
        if is_warmed:
            llm.generate(prompts[:64], params, use_tqdm=False)
        llm.reset_prefix_cache()
        begun = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - begun
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        record(
            what,
            shape=name,
            rows=len(prompts),
            completion_tokens=num_tokens,
            generation_s=round(seconds, 2),
            completion_tokens_per_s=round(num_tokens / seconds, 1),
        )
    if has_own_process:
        llm.llm_engine.engine_core.shutdown()  # it would keep the GPU's memory for a while
    os._exit(0)


def report(logs: list[Path]) -> None:
    """A table of rates, and of `batchinfer run` as a share of the best `LLM.generate`."""
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    rates = {
        (line["test"], line["shape"]): line["completion_tokens_per_s"]
        for line in lines
        if "shape" in line and "completion_tokens_per_s" in line
    }
    tests = list(dict.fromkeys(test for test, _ in rates))
    click.echo("| in/out | " + " | ".join(tests) + " | run / best generate |")
    click.echo("|---" * (len(tests) + 2) + "|")
    for shape in dict.fromkeys(shape for _, shape in rates):
        cells = [f"{rates[test, shape]:,.0f}" if (test, shape) in rates else "" for test in tests]
        shares = []
        for end in ("", ", cold", ", fp8", ", cold, fp8"):
            calls = [rates.get((way + end, shape), 0) for way in (GENERATE, IN_PROCESS)]
            if (of_run := rates.get((RUN + end, shape))) and max(calls):
                shares.append(f"{of_run / max(calls):.2f}{end}")
        click.echo(f"| {shape} | " + " | ".join([*cells, "; ".join(shares)]) + " |")


if __name__ == "__main__":
    main()
