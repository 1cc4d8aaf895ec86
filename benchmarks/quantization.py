"""What every quantization costs and gains here: memory, load time, speed, loss of quality.

    python -m benchmarks.quantization [--only w8a8 nf4 ...] [--shape demo|8b] [--parts loss speed]

One row for each name and checkpoint. The demo model's Linears are rounded to nearest by
tests/support/checkpoints.py, without calibration. Two processes each:

- a `batchinfer run` scores the reference summaries (teacher-forced): the mean negative
  log-likelihood of a reference token, what ran, by which class and kernel;
- the engine of a run, fed by its loop: seconds from its first import to the first step, bytes of
  the loaded weights, completion tokens/s with many sequences at once and with few.

--shape 8b: the second part alone, with dummy weights in the shape of Llama-3.1-8B. A name that
cannot run here has its reason instead. --write puts the table into docs/quantization.md; with
--from LOG it is made of a log of another machine: speed and size of the 8b shape, loss of the demo.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common import DEMO, ROOT, heading, machine

TEMPLATE = (
    "<|im_start|>user\nSummarize this software package in one line.\n\n{{ description }}"
    "<|im_end|>\n<|im_start|>assistant\n{{ reference_summary }}<|im_end|>"
)
DOCS = ROOT / "docs" / "quantization.md"
NUM_SCORED_ROWS = 256


@dataclass(frozen=True, slots=True)
class Case:
    """A name in the job file, the checkpoint it is run with (None: the plain model), a dtype."""

    name: str
    kind: str | None = None
    dtype: str = "auto"

    @property
    def key(self) -> str:
        return self.kind or self.name

    @property
    def label(self) -> str:
        return ", ".join(filter(None, [self.name, self.kind, self.dtype.replace("auto", "")]))


CASES = (
    Case("bf16"),
    Case("fp16"),
    Case("fp32"),
    Case("int8", "w8a8"),
    Case("int4", "w4a16"),
    Case("fp8"),
    Case("fp8", "fp8-block"),
    Case("fp8", "fp8-channel"),
    Case("fp8", "fp8-tensor"),
    Case("awq", "awq"),
    Case("gptq", "gptq"),
    Case("nf4"),
    Case("nf4", "bnb-nf4"),
    Case("nf4", "bnb-fp4"),
    Case("nf4", "bnb-int8"),
    Case("fp4", "nvfp4"),
    Case("fp4", "mxfp4"),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """How much the second part runs: prompts of `prompt_tokens`, completions of `max_tokens`."""

    num_many: int
    num_few: int
    prompt_tokens: int
    max_tokens: int
    kv_cache_bytes: int


SHAPES = {"demo": Shape(256, 8, 64, 48, 1 << 28), "8b": Shape(512, 8, 256, 128, 64 << 30)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="names of plain models, kinds of checkpoints")
    parser.add_argument("--parts", nargs="+", choices=["loss", "speed"], default=["loss", "speed"])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--repeats", type=int, default=2, help="of the speed, the best counts")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    parser.add_argument("--log", type=Path, help="append a JSON line for each row to this file")
    parser.add_argument("--from", dest="made_from", type=Path, help="make the table of this log")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or len(arguments.parts) < 2):
        parser.error("--write replaces the whole table: measure all of it")
    if arguments.child:
        measure_speed(arguments.child, SHAPES[arguments.shape], arguments.repeats)
        return
    if arguments.made_from:
        rows = _of_log(arguments.made_from)
        show(f"{rows[0]['cpu']}, {rows[0]['cores']} cores, one NVIDIA H200", rows, "8b", arguments)
        return
    cases = [case for case in CASES if not arguments.only or case.key in arguments.only]
    title = heading()
    click.echo(title)
    rows = []
    for case in cases:
        rows.append(measure(case, arguments.shape, arguments.parts, arguments.repeats))
        click.echo(json.dumps(rows[-1]))
        if arguments.log:
            with arguments.log.open("a") as log:
                log.write(json.dumps({**machine(), "shape": arguments.shape, **rows[-1]}) + "\n")
    show(title, rows, arguments.shape, arguments)


def show(
    title: str, rows: Sequence[dict[str, Any]], shape: str, arguments: argparse.Namespace
) -> None:
    text = "\n".join([title, "", *table(rows, SHAPES[shape])])
    click.echo(text)
    if arguments.write:
        begin, end = f"<!-- {shape}: begin -->", f"<!-- {shape}: end -->"
        head, _, rest = DOCS.read_text().partition(begin)
        DOCS.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def _of_log(log: Path) -> list[dict[str, Any]]:
    """A row for each case, in the order of `CASES`: what the 8b shape says, and the demo's loss."""
    found: dict[str, dict[str, Any]] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        kept = found.get(row["label"], {})
        found[row["label"]] = row | kept if row["shape"] == "demo" else kept | row
    rows = [found[case.label] for case in CASES if case.label in found]
    for row in rows:
        if row["shape"] == "demo":
            del row["layers"]["weights_bytes"]  # says nothing beside those of the 8b shape
    return rows


def measure(case: Case, shape: str, parts: Sequence[str], repeats: int) -> dict[str, Any]:
    """A row of the table; "problem" if the name does not run here."""
    found: dict[str, Any] = {"label": case.label}
    with tempfile.TemporaryDirectory(prefix="batchinfer-quantization-") as name:
        folder = Path(name)
        model = write_model(folder / "model", case, shape)
        if shape == "demo" and "loss" in parts:
            found |= score(folder, case, model)
        if "speed" in parts and "problem" not in found:
            path = folder / "speed.json"
            path.write_text(json.dumps(job_of(folder, case, model, SHAPES[shape], is_scored=False)))
            command = [sys.executable, "-m", "benchmarks.quantization", "--child", str(path)]
            command += ["--shape", shape, "--repeats", str(repeats)]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            found |= _last_json(ended)
    return found


def _last_json(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    try:
        last: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": f"exit {ended.returncode}: {ended.stderr.strip()[-300:]}"}
    return last


def write_model(folder: Path, case: Case, shape: str) -> Path:
    from tests.support.checkpoints import KINDS, write_checkpoint  # imports torch

    if shape == "demo":
        return DEMO / "model" if case.kind is None else write_checkpoint(case.kind, folder)
    from benchmarks.gpu import LLAMA_8B

    folder.mkdir()
    settings = {} if case.kind is None else {"quantization_config": dict(KINDS[case.kind].settings)}
    if case.kind == "gptq":  # vLLM would look into the weights that are not there
        modules = [f"self_attn.{name}_proj" for name in "qkvo"]
        modules += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        settings["quantization_config"]["modules_in_block_to_quantize"] = [modules]
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | settings))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, folder)
    return folder


def job_of(
    folder: Path, case: Case, model: Path, shape: Shape, *, is_scored: bool
) -> dict[str, Any]:
    is_dummy = not (model / "model.safetensors").exists()
    return {
        "version": 1,
        "name": "quantization",
        "input": {"path": str(folder / "in.parquet"), "keep_columns": ["num_scored"]},
        "prompt": {"template": TEMPLATE},
        "model": {
            "path": str(model),
            "quantization": case.name,
            "dtype": case.dtype,
            "max_model_len": 2048,
        },
        "sampling": {"max_tokens": 1, "prompt_logprobs": True}
        if is_scored
        else {"max_tokens": shape.max_tokens, "logprobs": 1, "ignore_eos": True},
        "engine": {
            "options": {"kv_cache_memory_bytes": shape.kv_cache_bytes}
            | ({"load_format": "dummy"} if is_dummy else {})
        },
        "output": {"path": str(folder / "out")},
    }


def score(folder: Path, case: Case, model: Path) -> dict[str, Any]:
    """One `batchinfer run`: what ran, and the mean negative log-likelihood of reference tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    rows = pq.read_table(DEMO / "prompts").slice(0, NUM_SCORED_ROWS)
    texts = [f"{text}<|im_end|>" for text in rows.column("reference_summary").to_pylist()]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    scored = pa.array([len(text.ids) for text in encoded], pa.int32())
    pq.write_table(rows.append_column("num_scored", scored), folder / "in.parquet")
    path = folder / "score.json"
    path.write_text(json.dumps(job_of(folder, case, model, SHAPES["demo"], is_scored=True)))
    command = [sys.executable, "-m", "batchinfer", "run", str(path)]
    result = _last_json(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
    if "problem" in result or result["exit_code"]:
        return {"problem": result.get("problem") or result["message"]}
    file = folder / "out" / "in.parquet"
    table = pq.read_table(file, columns=["prompt_token_logprobs", "num_scored"])
    logprobs = np.concatenate(
        [
            row.values.to_numpy(zero_copy_only=False)[-num_scored.as_py() :]
            for row, num_scored in zip(*table.columns, strict=True)
        ]
    )
    facts = json.loads(pq.read_metadata(file).metadata[b"batchinfer"])["engine"]
    return {
        "dtype": facts["dtype"],
        "layers": facts["extra"]["layers"],
        "nll": float(-logprobs.mean()),
        "num_scored": pc.sum(table["num_scored"]).as_py(),
    }


def measure_speed(path: Path, shape: Shape, repeats: int) -> None:
    """Build the job's engine and time it, in this process. Prints a JSON line."""
    from batchinfer.config import load_job
    from batchinfer.engine.kinds import engine_kind
    from batchinfer.errors import BatchInferError
    from batchinfer.runner.factory import build_engine, engine_spec, model_of

    out = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints

    def tell(**found: Any) -> None:
        os.write(out, (json.dumps(found) + "\n").encode())
        os._exit(0)

    begun_s = time.monotonic()
    job = load_job(path, []).job
    try:
        model = model_of(job)
        engine_kind(job.engine.name).prepare(engine_spec(job, model))
        engine = build_engine(engine_kind(job.engine.name), engine_spec(job, model))
    except BatchInferError as error:
        tell(problem=str(error))
    rng = np.random.default_rng(0)

    def rate(num_rows: int) -> float:
        size = (num_rows, shape.prompt_tokens)
        prompts = list(rng.integers(10, model.vocab_size - 10, size, dtype=np.int32))
        return num_rows * shape.max_tokens / generate(job, engine, prompts)

    rate(1)
    start_s = time.monotonic() - begun_s
    many = max(rate(shape.num_many) for _ in range(repeats))
    few = max(rate(shape.num_few) for _ in range(repeats))
    layers = engine.facts.extra["layers"]
    tell(
        dtype=engine.facts.dtype,
        layers=layers,
        start_s=round(start_s, 1),
        repeats=repeats,
        tokens_per_s_many=round(many, 1),
        tokens_per_s_few=round(few, 1),
    )


def generate(job: Any, engine: Any, prompts: Sequence[Any]) -> float:
    """Seconds for all `prompts`, through the loop of a run."""
    from batchinfer.plan import Chunk
    from batchinfer.runner.loop import Loop
    from batchinfer.runner.ready import ReadyWork
    from batchinfer.telemetry import Clock, Counters

    clock = Clock()
    ready = ReadyWork(order="input", max_tokens=job.packing.buffer_tokens)
    ready.put(Chunk.of_prompts(prompts))
    ready.close()
    begun_s = time.monotonic()
    Loop(
        engine,
        ready,
        lambda results: None,
        Counters(clock),
        job=job,
        should_stop=lambda: False,
    ).run()
    return time.monotonic() - begun_s


def table(rows: Sequence[dict[str, Any]], shape: Shape) -> list[str]:
    lines = [
        f"| job | dtype | quantized | by | weights, MB | start, s | tokens/s, {shape.num_many} at "
        f"once | tokens/s, {shape.num_few} at once | NLL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "problem" in row:
            lines.append(f"| {row['label']} | {' '.join(row['problem'].split())} |")
            continue
        layers = row["layers"]
        lines.append(
            f"| {row['label']} | {row['dtype']} | {layers['num_quantized_layers']} of "
            f"{layers['num_layers']} | {', '.join([*layers['methods'], *layers['kernels']])} | "
            f"{_cell(layers, 'weights_bytes', 1, 1e6)} | {_cell(row, 'start_s', 1)} | "
            f"{_cell(row, 'tokens_per_s_many')} | {_cell(row, 'tokens_per_s_few')} | "
            f"{_cell(row, 'nll', 4)} |"
        )
    return lines


def _cell(row: dict[str, Any], key: str, num_digits: int = 0, unit: float = 1.0) -> str:
    return f"{row[key] / unit:,.{num_digits}f}" if key in row else ""


if __name__ == "__main__":
    main()
