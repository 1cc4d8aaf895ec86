"""Where the time from the command to the first engine step goes, and to the end of the process.

    python -m benchmarks.startup [--only in_process ...] [--repeats 3]

Four rows of the demo job on the real engine. in_process: as `batchinfer run` does. own_process:
vLLM's engine core and worker in processes of their own. compiled: `enforce_eager: false`, cold with
an empty compile cache each time, warm with the one that the run before left. llama_cpp: the model
as a GGUF file in float32. nothing_to_do: the same job once more, complete. Interleaved; the spans
are of the run with the shortest start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import ROOT, heading, spread

JOB = ROOT / "jobs" / "summarize.yaml"
NUM_ROWS = 4
VARIANTS = (
    "in_process",
    "own_process",
    "compiled_cold",
    "compiled_warm",
    "llama_cpp",
    "nothing_to_do",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    with tempfile.TemporaryDirectory(prefix="batchinfer-startup-") as name:
        folder = Path(name)
        if "compiled_warm" in runs:
            _run("compiled_warm", folder, -1)
        if "llama_cpp" in runs:
            _quantize(folder / "model.gguf")
        if "nothing_to_do" in runs:
            _start(folder / "complete", f"input.path={_small_input(folder)}")
        for repeat in range(arguments.repeats):
            for variant in runs:
                runs[variant].append(_run(variant, folder, repeat))
    click.echo(heading())
    for variant, results in runs.items():
        click.echo(
            f"\n{variant}, the process: {spread([r['wall_s'] for r in results])} s", nl=False
        )
        click.echo(f", {spread([r['cpu_s'] for r in results])} CPU s")
        startups = [r["startup"] for r in results if r["startup"]]
        if startups:
            best = min(startups, key=lambda startup: float(startup["total_s"]))
            click.echo(f"to the first step: {spread([s['total_s'] for s in startups])} s")
            for span, value in best.items():
                if span != "total_s":
                    begin, end = value
                    click.echo(f"  {span:22} {begin:6.2f} to {end:6.2f}  {end - begin:6.2f} s")


def _run(variant: str, folder: Path, repeat: int) -> dict[str, Any]:
    if variant == "nothing_to_do":
        return _start(folder / "complete", f"input.path={folder / 'in.parquet'}")
    environ, sets = {}, []
    if variant == "own_process":
        environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    elif variant == "llama_cpp":
        sets = [f"model.path={folder / 'model.gguf'}", "engine.name=llama_cpp"]
    elif variant.startswith("compiled"):
        cache = folder / (f"cache-{repeat}" if variant == "compiled_cold" else "cache")
        environ = {
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        }
        sets = ['engine.options={"enforce_eager": false}']
    return _start(folder / f"{variant}-{repeat}", *sets, limit=NUM_ROWS, environ=environ)


def _quantize(file: Path) -> None:
    model = str(ROOT / "jobs" / "demo" / "model")
    command = ["quantize", model, str(file), "--method", "gguf", "--type", "f32"]
    subprocess.run([sys.executable, "-m", "batchinfer", *command], check=True, capture_output=True)


def _small_input(folder: Path) -> Path:
    import polars as pl

    rows = pl.read_parquet(ROOT / "jobs" / "demo" / "prompts" / "*.parquet").head(NUM_ROWS)
    rows.write_parquet(folder / "in.parquet")
    return folder / "in.parquet"


def _start(
    output: Path, *sets: str, limit: int | None = None, environ: dict[str, str] | None = None
) -> dict[str, Any]:
    """One `batchinfer run`; its wall and CPU seconds, children's included, and its start-up."""
    settings = [argument for s in (*sets, f"output.path={output}") for argument in ("--set", s)]
    limits = ["--limit", str(limit)] if limit else []
    begun_s, cpu_s = time.monotonic(), _children_cpu_s()
    ended = subprocess.run(
        [sys.executable, "-m", "batchinfer", "run", str(JOB), *limits, *settings],
        cwd=ROOT,
        env=os.environ | (environ or {}),
        capture_output=True,
        text=True,
    )
    wall_s, cpu_s = time.monotonic() - begun_s, _children_cpu_s() - cpu_s
    if ended.returncode:
        sys.exit(f"batchinfer run failed:\n{ended.stderr}")
    status = output / "_batchinfer" / "status" / "0001.json"
    is_new = json.loads(ended.stdout.splitlines()[-1])["startup_s"] is not None
    startup = json.loads(status.read_text())["startup"] if is_new else None
    return {"wall_s": wall_s, "cpu_s": cpu_s, "startup": startup}


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
