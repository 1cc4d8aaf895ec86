"""All devices of a machine by one command, beside one of them and beside slices started by hand.

    python -m benchmarks.devices --log FILE [--set gpu] [--parts one all ray] [--rows 16384]

`--set gpu`: a model of Llama-3.1-8B's shape with dummy weights; prompts and lengths as in
benchmarks/gpu.py. `--set cpu`: the demo model on two cores, greedy. Each part is measured on a
skewed set of files (one has half of the rows, sixteen share the others) and on one single file
(`--inputs`). `one` is `engine.devices: 1`, `all` is `auto` (on a CPU 2), `ray` is that with
`executor: ray` (in Ray on this machine, unless RAY_ADDRESS names a cluster), `slices` is one
process for each device with `--slice i/n`, `kill` is `all` with SIGKILL to one replica halfway.
Prints a JSON line for each and appends it to --log: `wall_s` is from the command to its end,
`generation_s` from the first admission to the last finish. Compare rows a second of generation
(`rows_per_s`), which lengths that are sampled do not change much, and completion tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import DEMO, ROOT, machine, versions
from benchmarks.gpu import MAX_TOKENS, STOP_TOKEN_IDS, write_model

PARTS = ("one", "all", "ray", "slices", "kill")
INPUTS = ("skewed", "single")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--set", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["one", "all"])
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--devices", type=int, default=2, help="how many there are")
    arguments = parser.parse_args()

    def record(**result: Any) -> None:
        line = json.dumps(result)
        print(line, flush=True)  # noqa: T201
        with arguments.log.open("a") as log:
            log.write(line + "\n")

    record(test="machine", **machine(), **versions())
    with tempfile.TemporaryDirectory(prefix="batchinfer-devices-") as name:
        bench = Bench(Path(name), arguments.set, arguments.rows, arguments.devices)
        for given in arguments.inputs:
            for part in arguments.parts:
                record(test=part, input=given, **bench.measure(part, given))


class Bench:
    def __init__(self, folder: Path, kind: str, num_rows: int, num_devices: int) -> None:
        self._folder = folder
        self._kind = kind
        self._num_devices = num_devices
        if kind == "gpu":
            write_model(folder / "model")
        write_inputs(folder, kind, num_rows)

    def measure(self, part: str, given: str) -> dict[str, Any]:
        output = self._folder / f"out-{part}-{given}"
        devices: int | str = 1
        if part in ("all", "ray", "kill"):
            devices = "auto" if self._kind == "gpu" else self._num_devices
        job = self._job(given, output, devices)
        job["executor"] = "ray" if part == "ray" else "local"
        path = self._folder / f"{part}-{given}.yaml"
        path.write_text(json.dumps(job))  # JSON is YAML
        begun_s = time.monotonic()
        if part == "slices":
            runs = [self._start(path, n) for n in range(self._num_devices)]
        else:
            runs = [self._start(path)]
        killed_s = self._kill_halfway(runs[0], output) if part == "kill" else None
        lines = [run.communicate()[0].splitlines() for run in runs]
        results = [json.loads(each[-1]) if each else {} for each in lines]
        wall_s = time.monotonic() - begun_s
        found = summed(results) | {"wall_s": round(wall_s, 1)}
        found["codes"] = [run.returncode for run in runs]
        found |= shares(output)
        if killed_s is not None:
            found["killed_after_s"] = round(killed_s - begun_s, 1)
        if messages := [r["message"] for r in results if r.get("message")]:
            found["message"] = messages[0][:500]
        return found

    def _start(self, path: Path, slice_index: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "batchinfer", "run", str(path)]
        environ = dict(os.environ)
        if slice_index is not None:
            command += ["--slice", f"{slice_index + 1}/{self._num_devices}"]
            environ["CUDA_VISIBLE_DEVICES"] = str(slice_index)
        if self._kind == "cpu" and (slice_index is not None or "one-" in path.name):
            core = sorted(os.sched_getaffinity(0))[slice_index or 0]
            command = ["taskset", "-c", str(core), *command]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environ, text=True)

    def _kill_halfway(self, run: subprocess.Popen[str], output: Path) -> float | None:
        status = output / "_batchinfer" / "status" / "0001.json"
        while run.poll() is None:
            time.sleep(0.5)
            try:
                record = json.loads(status.read_text())
            except (OSError, ValueError):
                continue
            if record["rows_durable"] >= (record["rows_total"] or 0) / 2 > 0:
                os.kill(children_of(run.pid)[0], signal.SIGKILL)
                return time.monotonic()
        return None

    def _job(self, given: str, output: Path, devices: int | str) -> dict[str, Any]:
        job: dict[str, Any] = {
            "version": 1,
            "name": "devices",
            "input": {"path": str(self._folder / given / "*.parquet")},
            "engine": {"devices": devices},
            "output": {"path": str(output)},
        }
        if self._kind == "cpu":
            return job | {
                "prompt": {"template": "{{ text }}"},
                "model": {"path": str(DEMO / "model")},
                "sampling": {"max_tokens": 48, "ignore_eos": True},
            }
        job["engine"]["options"] = {"load_format": "dummy"}
        return job | {
            "prompt": {"token_ids_column": "prompt"},
            "model": {"path": str(self._folder / "model"), "max_model_len": 4096},
            "sampling": {
                "max_tokens": MAX_TOKENS,
                "temperature": 1.0,
                "logprobs": 1,
                "seed": None,
                "stop_token_ids": STOP_TOKEN_IDS,
                "ignore_eos": True,
            },
        }


def children_of(pid: int) -> list[int]:
    """The replicas."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # it has ended, or is no process
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return sorted(found)


def write_inputs(folder: Path, kind: str, num_rows: int) -> None:
    """`single/` with one file, `skewed/` with half of the same rows in one of seventeen."""
    rng = np.random.default_rng(0)
    if kind == "gpu":
        lengths = np.clip(rng.lognormal(np.log(256), 0.7, num_rows), 32, 2048).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = rng.integers(10, 128_000, offsets[-1], dtype=np.int32)
        table = pa.table({"prompt": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))})
    else:
        words = np.clip(rng.lognormal(np.log(24), 0.7, num_rows), 4, 200).astype(int)
        table = pa.table({"text": [f"{n} " + "word " * int(w) for n, w in enumerate(words)]})
    for name in INPUTS:
        (folder / name).mkdir()
    pq.write_table(table, folder / "single" / "all.parquet")
    half = num_rows // 2
    bounds = [0, half, *(half + (num_rows - half) * n // 16 for n in range(1, 17))]
    for n in range(17):
        part = table.slice(bounds[n], bounds[n + 1] - bounds[n])
        pq.write_table(part, folder / "skewed" / f"p{n:02}.parquet")


def summed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the last lines: sums, and of durations the longest."""
    rows = sum(r.get("rows_computed", 0) for r in results)
    tokens = sum(r.get("completion_tokens", 0) for r in results)
    seconds = max((r.get("generation_s", 0.0) for r in results), default=0.0)
    return {
        "rows": rows,
        "completion_tokens": tokens,
        "generation_s": seconds,
        "rows_per_s": round(rows / seconds, 2) if seconds else None,
        "completion_tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "startup_s": max((r.get("startup_s") or 0.0 for r in results), default=None),
        "mean_num_running": [r.get("mean_num_running") for r in results],
        "steps": [r.get("steps") for r in results],
    }


def shares(output: Path) -> dict[str, Any]:
    """What each replica computed, from the log."""
    logs = sorted((output / "_batchinfer" / "logs").glob("*.log"))
    text = "".join(log.read_text(errors="replace") for log in logs)
    pattern = r" computed rows=(\d+) tokens_per_s=([\d.]+).*?replica=\"?([^\"\n]+)"
    found = {
        who: {"rows": int(rows), "tokens_per_s": float(rate)}
        for rows, rate, who in re.findall(pattern, text)
    }
    return {"replicas": found} if found else {}


if __name__ == "__main__":
    main()
