"""Which dtype is fast on which CPU: tokens/s of the demo job for each, by vLLM's CPU libraries.

    python -m benchmarks.dtypes [--rows 200] [--repeats 3] [--cpus avx2 avx512] [--write]

Each run is a `batchinfer run` of jobs/summarize.yaml; the best of the repeats counts, as what else
the machine does only ever takes from it. Beside the machine's own CPU come those that it can stand
in for (tests/support/cpus.py): vLLM loads another library, torch and oneDNN choose kernels of fewer
instruction sets. That shows which dtype a kernel exists for, not the speed of such a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import click

from batchinfer.engine.vllm.machine import this_machine
from batchinfer.quantization import auto_dtype
from benchmarks.common import ROOT, heading
from tests.support.cpus import CPUS, environment

DTYPES = ("bfloat16", "float32", "float16")
OWN = "this CPU"
DOCS = ROOT / "docs" / "quantization.md"
BEGIN, END = "<!-- dtypes: begin -->", "<!-- dtypes: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpus", nargs="*", choices=["avx2", "avx512"], default=["avx512", "avx2"])
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    arguments = parser.parse_args()
    title = heading()
    best: dict[tuple[str, str], float] = {}
    for _ in range(arguments.repeats):  # in turns: a machine that is busy for a while hits all
        for cpu in (OWN, *arguments.cpus):
            for dtype in DTYPES:
                rate = measure(cpu, dtype, arguments.rows)
                click.echo(json.dumps({"cpu": cpu, "dtype": dtype, "tokens_per_s": rate}))
                best[cpu, dtype] = max(rate, best.get((cpu, dtype), 0.0))
    text = "\n".join([title, "", *table(best, [OWN, *arguments.cpus])])
    click.echo(text)
    if arguments.write:
        head, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def measure(cpu: str, dtype: str, num_rows: int) -> float:
    """Completion tokens a second, from the first admission to the last finish."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["batchinfer", "run", "jobs/summarize.yaml", "--limit", str(num_rows)]
        sets = [f"model.dtype={dtype}", f"output.path={folder}/out"]
        done = subprocess.run(
            [sys.executable, "-m", *command, *(text for s in sets for text in ("--set", s))],
            cwd=ROOT,
            env=os.environ | ({} if cpu == OWN else environment(cpu)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return float(result["completion_tokens_per_s"])


def table(best: dict[tuple[str, str], float], cpus: list[str]) -> list[str]:
    lines = [
        f"| CPU | vLLM's library | {' | '.join(DTYPES)} | `auto` of a bfloat16 / float16 model |",
        f"|---|---|{'---|' * len(DTYPES)}---|",
    ]
    for cpu in cpus:
        machine = this_machine() if cpu == OWN else CPUS[cpu]
        library = machine.library
        autos = " / ".join(auto_dtype(own, machine)[0] for own in ("bfloat16", "float16"))
        cells = [
            cpu if cpu == OWN else f"{cpu}, stood in for",
            f"`{library.file.split('.')[0]}` ({library.instructions})" if library else "",
            *(f"{best[cpu, dtype]:,.0f}" for dtype in DTYPES),
            autos,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
