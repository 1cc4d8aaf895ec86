"""Is the engine ever idle? Steps that run short of rows, and storage that stalls.

    python -m benchmarks.idle [--only steps stalls s3 real_stall] [--rows N]

steps: the real engine on the demo model, skewed lengths, six shards, 64 sequences at once.
stalls: a fake engine whose steps take 20 ms, on a disk where the first part takes 30 s to write,
and where four do (two threads write). s3: the same engine with input and output on an S3 server
behind a proxy that delays each call by 200 ms. real_stall: the real engine, first part of 30 s.
Each stalled run stands beside one without the stall, in turns; tokens/s are from the first
admission to the last finish, so they hold every wait between two steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import click
import polars as pl
import yaml

from benchmarks.common import DEMO, ROOT, heading
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.jobs import Place
from tests.support.s3_server import s3_server

STALL_S = 30.0
CALL_S = 0.2
STEP_S = 0.02
NUM_SHARDS = 6
MAX_NUM_SEQS = 64
#: Frequent tokens of the demo model: its completions then have a median of about 30 tokens, and one
#: in twelve goes on to the end.
STOP_TOKEN_IDS = [4, 28, 46, 68, 75, 326, 508, 811]


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    engine: str = "fake"  # "fake" or "real"
    num_slow_parts: int = 0
    place: Place | None = None
    environ: dict[str, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    groups = ["steps", "stalls", "s3", "real_stall"]
    parser.add_argument("--only", nargs="*", choices=groups, default=groups)
    parser.add_argument("--rows", type=int, default=None, help="of each run")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.child is not None:
        _run_here(rest[0], **arguments.child)
        return
    click.echo(heading())
    click.echo(
        f"{'':44} {'tokens/s':>9} {'ratio':>6} {'steps':>6} {'underfilled':>11} {'running':>8} "
        f"{'stalled':>8} {'to disk':>8}"
    )
    for group in arguments.only:
        with _variants(group) as variants:
            _measure(variants, arguments.rows, arguments.repeats)


@contextlib.contextmanager
def _variants(group: str) -> Iterator[list[Variant]]:
    """What is compared; the first one is the base."""
    if group == "steps":
        yield [Variant("real engine, 64 at once", "real")]
    elif group == "real_stall":
        yield [
            Variant("real engine", "real"),
            Variant(f"real engine, first part takes {STALL_S:g} s", "real", num_slow_parts=1),
        ]
    elif group == "stalls":
        yield [
            Variant("local disk"),
            Variant(f"local disk, first part takes {STALL_S:g} s", num_slow_parts=1),
            Variant(f"local disk, four parts take {STALL_S:g} s each", num_slow_parts=4),
        ]
    else:
        with s3_server() as server, fault_proxy(server.url) as proxy:
            proxy.reset(Rule("delay", delay_s=CALL_S, times=None))
            near = Place(f"s3://{server.create_bucket()}", server.environment())
            far = Place(f"s3://{server.create_bucket()}", server.environment(proxy.url))
            delay = f"S3, each call takes {1000 * CALL_S:g} ms more"
            yield [Variant("local disk"), Variant("S3", place=near), Variant(delay, place=far)]


def _measure(variants: list[Variant], num_rows: int | None, repeats: int) -> None:
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            with tempfile.TemporaryDirectory(prefix="batchinfer-idle-") as name:
                runs[variant.name].append(_run(variant, Path(name), num_rows))
    base = max(run["completion_tokens_per_s"] for run in runs[variants[0].name])
    for name, results in runs.items():
        best = max(results, key=lambda run: float(run["completion_tokens_per_s"]))
        rate = best["completion_tokens_per_s"]
        click.echo(
            f"{name:44} {rate:9,.0f} {rate / base:6.3f} {best['steps']:6} "
            f"{best['share_of_steps_underfilled']:11.2%} {best['mean_num_running']:8.1f} "
            f"{best['stalled_s']:6.2f} s {best['wall_s'] - best['startup_s']:6.1f} s"
        )


def _run(variant: Variant, folder: Path, num_rows: int | None) -> dict[str, Any]:
    place = variant.place or Place(str(folder))
    is_real = variant.engine == "real"
    job = _write_job(place, folder, num_rows or (1200 if is_real else 4_000), is_real=is_real)
    child = {"engine": variant.engine, "num_slow_parts": variant.num_slow_parts}
    begun_s = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.idle", "--child", json.dumps(child), str(job)],
        cwd=ROOT,
        env=os.environ | dict(place.environ),
        capture_output=True,
        text=True,
    )
    wall_s = time.monotonic() - begun_s
    if ended.returncode:
        sys.exit(f"{variant.name} failed:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result | {"wall_s": wall_s}


def _write_job(place: Place, folder: Path, num_rows: int, *, is_real: bool) -> Path:
    texts = pl.read_parquet(DEMO / "prompts" / "*.parquet")["description"]
    rows = pl.DataFrame(
        {
            "id": [f"row-{n}" for n in range(num_rows)],
            "text": [" ".join(texts[n % len(texts)].split()[:20]) for n in range(num_rows)],
        }
    )
    for index, shard in enumerate(rows.iter_slices(-(-num_rows // NUM_SHARDS))):
        place.write_parquet(f"in/{index:05d}.parquet", shard)
    job = {
        "version": 1,
        "name": "idle",
        "input": {"path": place.url("in", "*.parquet"), "id_column": "id"},
        "prompt": {"column": "text"},
        "model": {"path": str(DEMO / "model")},
        "sampling": {
            "max_tokens": 256 if is_real else 64,
            "logprobs": 1,
            "stop_token_ids": STOP_TOKEN_IDS,
        },
        "packing": {"deduplicate": False},
        "engine": {"max_num_seqs": MAX_NUM_SEQS},
        "checkpoint": {"every_s": 5},
        "output": {"path": place.url(f"out-{time.monotonic_ns()}")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _run_here(job: str, engine: str, num_slow_parts: int) -> None:
    """`batchinfer run` in this process, with what is fake about it."""
    from batchinfer.cli import main as batchinfer
    from batchinfer.prompt import encode
    from batchinfer.storage.local import LocalStore
    from batchinfer.testing import FakePlan, LightTokenizer, fake_kind, register

    if engine == "fake":
        plan = FakePlan(max_num_seqs=MAX_NUM_SEQS, step_s=STEP_S)
        register("fake", fake_kind(plan))
        encode._load = lambda path, **_: LightTokenizer(path)
    publish = LocalStore.publish
    num_left = num_slow_parts

    def slow_publish(store: LocalStore, key: str, write: Callable[[BinaryIO], None]) -> None:
        nonlocal num_left
        if key.endswith(".part") and num_left > 0:
            num_left -= 1
            time.sleep(STALL_S)
        publish(store, key, write)

    LocalStore.publish = slow_publish  # type: ignore[method-assign]
    name = "fake" if engine == "fake" else "vllm"
    sys.argv = ["batchinfer", "run", job, "--set", f"engine.name={name}"]
    batchinfer()


if __name__ == "__main__":
    main()
