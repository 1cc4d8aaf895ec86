"""Does `plan --measure` predict what `run` then takes? Both, in turn, on jobs of several shapes.

    python -m benchmarks.forecast [--rows 96] [--repeats 2] [--cpu] [SHAPE ...]

Prints predicted / actual for the generation, for the whole process and for completion tokens, and
beside it the naive estimate: the measurement's seconds, times rows left / rows measured. With
--cpu the seconds are those of the main thread's CPU, in both: on the CPU the engine computes there,
and on a machine that others use too, elapsed time says more about them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.common import ROOT, heading, spread

#: Settings on top of jobs/summarize.yaml: 1,200 rows, greedy, 48 tokens at most, 256 sequences.
SHAPES: dict[str, dict[str, str]] = {
    "demo": {},
    "narrow and skewed": {
        "engine.max_num_seqs": "16",
        "sampling.max_tokens": "128",
        "sampling.temperature": "1.3",
    },
    "two samples": {"sampling.n": "2", "sampling.temperature": "0.7"},
    "equal lengths": {"sampling.ignore_eos": "true", "sampling.max_tokens": "32"},
}

_ON_CPU_CLOCK = """
import time, types
from batchinfer.cli import main
from batchinfer.forecast import measure
measure.time = types.SimpleNamespace(monotonic=time.thread_time)
main()
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """Of a whole run."""

    generation_s: float
    total_s: float
    completion_tokens: float
    naive_s: float = 0.0  # for the generation


def arguments_of(name: str, sets: dict[str, str]) -> list[str]:
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    return [name, "jobs/summarize.yaml", *words]


def predicted(sets: dict[str, str], num_rows: int, *, is_cpu: bool) -> Taken:
    ended = subprocess.run(
        [
            *([sys.executable, "-c", _ON_CPU_CLOCK] if is_cpu else _BATCHINFER),
            *arguments_of("plan", sets),
            *("--measure", str(num_rows)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"plan ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    number, seconds = r"([\d,.]+)", r"([\d:.]+)(?: s)?"
    num_left = _find(rf"left +{number} results", ended.stdout) / int(sets.get("sampling.n", 1))
    measured_s = _find(rf"rows in {number} s", ended.stdout)
    return Taken(
        generation_s=_find(rf"{seconds} to generate", ended.stdout),
        total_s=_find(rf"time +about {seconds}", ended.stdout),
        completion_tokens=_find(rf"of prompts, {number}", ended.stdout),
        naive_s=measured_s * num_left / _find(rf"ran +{number} rows", ended.stdout),
    )


_BATCHINFER = [sys.executable, "-m", "batchinfer"]


def _find(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} is not in:\n{text}"
    seconds = 0.0
    for part in found[1].replace(",", "").split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def actual(sets: dict[str, str], *, is_cpu: bool) -> Taken:
    begun_s = time.monotonic()
    process = subprocess.Popen(
        [*_BATCHINFER, *arguments_of("run", sets)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    cpu_s: list[float] = []
    assert process.stderr is not None
    for line in process.stderr:
        if " engine_ready " in line or " generated " in line:
            cpu_s.append(_main_thread_cpu_s(process.pid))
    stdout, _ = process.communicate()
    total_s = time.monotonic() - begun_s
    if process.returncode:
        raise SystemExit(f"run ended with {process.returncode}:\n{stdout}")
    result = json.loads(stdout.splitlines()[-1])
    ready_s, generated_s = cpu_s
    generation_s = generated_s - ready_s if is_cpu else result["generation_s"]
    return Taken(generation_s, total_s, result["completion_tokens"])


def _main_thread_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of the main thread")
    arguments = parser.parse_args()
    click.echo(heading())
    kind = "CPU seconds of the main thread" if arguments.cpu else "elapsed seconds"
    click.echo(f"{arguments.rows} rows measured of 1,200, then all run; {kind}")
    for shape in arguments.shapes:
        pairs = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as folder:
                sets = SHAPES[shape] | {"output.path": f"{folder}/out"}
                prediction = predicted(sets, arguments.rows, is_cpu=arguments.cpu)
                pairs.append((prediction, actual(sets, is_cpu=arguments.cpu)))
        click.echo(f"{shape}: {SHAPES[shape] or 'as it is'}")
        click.echo(f"  generation: {spread([a.generation_s for _, a in pairs])} s")
        ratios = {
            "generation": [p.generation_s / a.generation_s for p, a in pairs],
            "naive": [p.naive_s / a.generation_s for p, a in pairs],
            "completion tokens": [p.completion_tokens / a.completion_tokens for p, a in pairs],
        }
        if not arguments.cpu:
            ratios["whole process"] = [p.total_s / a.total_s for p, a in pairs]
        for name, values in ratios.items():
            click.echo(f"  predicted / actual, {name}: {spread(values)}")


if __name__ == "__main__":
    main()
