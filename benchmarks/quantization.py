"""Every quantization that this machine can run, end to end: what really ran, memory, speed, loss.

    python -m benchmarks.quantization [--rows 256] [--only int8 fp8 ...]

The demo model, its Linears rounded to nearest by tests/support/checkpoints.py (no calibration),
each through two `batchinfer run`s: one writes 48 greedy tokens for each row, one scores the
reference summaries. Prints a table: layers quantized of all, by which class and kernel, size of
the weight file, start-up, completion tokens a second while generating, and the mean logprob of a
reference token. A name that cannot run here has its reason instead. One run each, no warm-up: the
speed of a 7M model says little about a large one's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from benchmarks.common import DEMO, heading
from tests.support.checkpoints import write_checkpoint

TEMPLATE = (
    "<|im_start|>user\nSummarize this software package in one line.\n\n{{ description }}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Case:
    """A name in the job file, the checkpoint it is run with (None: the demo model), a dtype."""

    name: str
    kind: str | None = None
    dtype: str = "auto"

    @property
    def label(self) -> str:
        return ", ".join(filter(None, [self.name, self.kind, self.dtype.replace("auto", "")]))


CASES = (
    Case("bf16"),
    Case("fp16"),
    Case("fp32"),
    Case("int8", "w8a8"),
    Case("int8", "w8a8", "float16"),
    Case("int4", "w4a16"),
    Case("int4", "w4a16", "float16"),
    Case("fp8"),
    Case("fp8", "fp8-block"),
    Case("fp8", "fp8-block-compressed"),
    Case("fp8", "fp8-channel"),
    Case("fp8", "fp8-tensor"),
    Case("awq", "awq"),
    Case("awq", "awq", "float16"),
    Case("gptq", "gptq"),
    Case("fp4", "nvfp4"),
    Case("fp4", "mxfp4"),
)


def run(folder: Path, case: Case, model: Path, what: str, prompt: str, **sampling: Any) -> Any:
    """One `batchinfer run`: (its JSON line, the finished file's table and facts)."""
    job = {
        "version": 1,
        "name": "quantization",
        "input": {"path": str(folder / "in.parquet"), "keep_columns": ["num_scored"]},
        "prompt": {"template": prompt},
        "model": {"path": str(model), "quantization": case.name, "dtype": case.dtype},
        "sampling": sampling,
        "output": {"path": str(folder / what)},
    }
    path = folder / f"{what}.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "batchinfer", "run", str(path)], capture_output=True, text=True
    )
    if not done.stdout:
        return {"exit_code": done.returncode, "message": done.stderr[-300:]}, None, None
    result = json.loads(done.stdout.splitlines()[-1])
    file = folder / what / "in.parquet"
    if result["exit_code"]:
        return result, None, None
    return result, pl.read_parquet(file), json.loads(pq.read_metadata(file).metadata[b"batchinfer"])


def measure(case: Case, frame: pl.DataFrame) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = DEMO / "model"
        if case.kind is not None:
            model = write_checkpoint(case.kind, folder / "model")
        frame.write_parquet(folder / "in.parquet")
        result, _, facts = run(folder, case, model, "generate", TEMPLATE, max_tokens=48)
        if facts is None:
            return f"| {case.label} | exit {result['exit_code']}: {result['message']} |"
        scored_prompt = TEMPLATE + "{{ reference_summary }}<|im_end|>"
        ended, scored, _ = run(
            folder, case, model, "score", scored_prompt, max_tokens=1, prompt_logprobs=True
        )
        assert scored is not None, ended
        size = (model / "model.safetensors").stat().st_size / 1e6
    logprobs = np.concatenate(
        [
            np.array(row[-num_scored:])
            for row, num_scored in scored.select("prompt_token_logprobs", "num_scored").iter_rows()
        ]
    )
    engine = facts["engine"]
    layers = engine["extra"]["layers"]
    ran = ", ".join([*layers["methods"], *layers["kernels"]])
    return (
        f"| {case.label} | {engine['dtype']} | {layers['num_quantized_layers']} of "
        f"{layers['num_layers']} | {ran} | {size:.1f} | {result['startup_s']:.1f} | "
        f"{result['completion_tokens_per_s']:,.0f} | {logprobs.mean():.4f} |"
    )


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="names in the job file")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    frame = pl.read_parquet(DEMO / "prompts" / "*.parquet").head(arguments.rows)
    texts = [f"{text}<|im_end|>" for text in frame["reference_summary"]]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    frame = frame.with_columns(num_scored=pl.Series([len(text.ids) for text in encoded]))
    show(f"{heading()}\n{frame.height} rows, {frame['num_scored'].sum()} scored tokens\n")
    show("| job | dtype | quantized | by | MB | start s | tok/s | logprob |")
    show("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            show(measure(case, frame))


if __name__ == "__main__":
    main()
