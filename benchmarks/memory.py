"""Peak memory of `batchinfer run` above its engine's own, and how soon a large resume begins.

    python -m benchmarks.memory [--only rows group shards long logprobs resume s3]

The real command line in processes of its own, on the engine of `benchmarks.instant`. "Above the
engine's own" is the peak less that of a run on 50 rows. Admission is timed from the start of the
process; the stall of the engine's building (1 s) is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
import yaml

from batchinfer.ledger import Ledger, PartId, layout
from batchinfer.storage.local import LocalStore
from benchmarks.common import DEMO, ROOT, heading, peak_bytes_of
from tests.support.s3_server import s3_server

MB = 1_000_000
MAX_TOKENS = 16
WINDOW_ROWS = 16_384
#: Of one token each for the demo model's tokenizer.
_WORDS = np.array(["time", "year", "people", "way", "man", "child"])


@dataclass(frozen=True, slots=True)
class Shape:
    """An input: prompts of about `num_tokens` tokens, spread over `num_shards` files."""

    name: str
    num_rows: int
    num_shards: int = 1
    num_tokens: int = 12
    group_rows: int = 65_536
    logprobs: int = 1


SMALL = Shape("50 rows", 50)
CASES = {
    "rows": [
        Shape("10 thousand rows, 8 shards", 10_000, 8),
        Shape("100 thousand rows, 8 shards", 100_000, 8),
        Shape("1 million rows, 8 shards", 1_000_000, 8),
    ],
    "group": [Shape("1 million rows, 1 shard, 1 row group", 1_000_000, group_rows=1_000_000)],
    "shards": [Shape("10,000 shards of 10 rows", 100_000, 10_000)],
    "long": [Shape("20 thousand prompts of 2,000 tokens", 20_000, 4, num_tokens=2_000)],
    "logprobs": [Shape("100 thousand rows, logprobs 5", 100_000, 8, logprobs=5)],
}
RESUME = Shape("1 million rows, 8 shards", 1_000_000, 8)
NUM_PARTS = 4_000


@dataclass(frozen=True, slots=True)
class Ran:
    """What one start showed of itself."""

    wall_s: float
    admission_s: float | None  # None: nothing was admitted
    admission_peak_bytes: int
    peak_bytes: int


def write_input(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True)
    chosen = np.random.default_rng(0).integers(0, len(_WORDS), (1_000, shape.num_tokens - 6))
    tails = [" ".join(words) for words in _WORDS[chosen].tolist()]
    bounds = np.linspace(0, shape.num_rows, shape.num_shards + 1).astype(int)
    for index in range(shape.num_shards):
        numbers = range(bounds[index], bounds[index + 1])
        table = pa.table(
            {
                "id": [f"row-{n}" for n in numbers],
                "text": [f"{n} {tails[n % 1_000]}" for n in numbers],
            }
        )
        path = folder / f"part-{index:05d}.parquet"
        pq.write_table(table, path, row_group_size=shape.group_rows)


def write_job(folder: Path, shape: Shape, root: str | None = None) -> Path:
    """`root`: where in/ and out/ are, if not in `folder`."""
    root = root or str(folder)
    job = {
        "version": 1,
        "name": "memory",
        "input": {"path": f"{root}/in/*.parquet", "id_column": "id"},
        "prompt": {"column": "text"},
        "model": {"path": str(DEMO / "model")},
        "sampling": {"max_tokens": MAX_TOKENS, "logprobs": shape.logprobs},
        "packing": {"window_rows": WINDOW_ROWS},
        "engine": {"name": "instant"},
        "output": {"path": f"{root}/out"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def run(job: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> Ran:
    """Run the job to its end."""
    mark = job.parent / "mark"
    mark.unlink(missing_ok=True)
    started_s = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.instant", "run", str(job), "--quiet", *arguments],
        cwd=ROOT,
        env=os.environ | {"BENCHMARK_MARK": str(mark)} | dict(environ or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak_bytes = 0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):
            peak_bytes = max(peak_bytes, peak_bytes_of(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{job} ended with {process.returncode}: {errors[-2000:]}")
    wall_s = time.time() - started_s
    if not mark.exists():
        return Ran(wall_s, None, 0, peak_bytes)
    admitted_s, admission_peak_bytes = mark.read_text().split()
    return Ran(wall_s, float(admitted_s) - started_s, int(admission_peak_bytes), peak_bytes)


def write_parts(folder: Path, job: Path) -> int:
    """All results of the input but the last 250, as parts of a run that was killed."""
    run(job, "--limit", "1")
    store = LocalStore(str(folder / "out"))
    digest = json.loads(store.read(layout.JOB_KEY))["digest"]
    ledger = Ledger(store, {"digest": digest, "engine": {}}, WINDOW_ROWS)
    (path,) = (folder / "out" / layout.PARTS_PREFIX).glob("*/*.part")
    result = pq.ParquetFile(path).read()
    rng = np.random.default_rng(0)
    todo = []
    names = sorted(path.name for path in (folder / "in").iterdir())
    for name in names:
        num_rows = pq.read_metadata(folder / "in" / name).num_rows - 250 * (name == names[-1])
        for start in range(0, num_rows, WINDOW_ROWS):
            rows = rng.permutation(np.arange(start, min(start + WINDOW_ROWS, num_rows)))
            pieces = np.array_split(rows, round(NUM_PARTS * len(rows) / RESUME.num_rows))
            todo += [(name, start // WINDOW_ROWS, piece) for piece in pieces]

    def publish(number: int) -> None:
        name, window, rows = todo[number]
        columns = dict(zip(result.column_names, result.take([0] * len(rows)).columns, strict=True))
        columns |= {"shard": pa.array([name] * len(rows)), "row": pa.array(np.sort(rows))}
        ledger.publish_part(name, PartId(window, 1, 100 + number), pa.table(columns))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(len(todo))))
    return len(todo)


def measure(folder: Path, shape: Shape) -> Ran:
    write_input(folder / "in", shape)
    return run(write_job(folder, shape))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="batchinfer-memory-") as folder:
        yield Path(folder)


def list_on_s3(num_shards: int) -> float:
    """Seconds from the start to the end of a first run on shards of 1 row, up to its admission."""
    shape = Shape(f"{num_shards} shards of 1 row", num_shards, num_shards)
    with s3_server() as server, scratch() as folder:
        bucket, environ = server.create_bucket(), server.environment()
        write_input(folder / "in", shape)
        filesystem = s3fs.S3FileSystem(
            endpoint_url=server.url, key="test", secret="test", skip_instance_cache=True
        )
        filesystem.put(f"{folder}/in/", f"{bucket}/in/", recursive=True)
        job = write_job(folder, shape, f"s3://{bucket}")
        ran = run(job, "--limit", "1", environ=environ)
    assert ran.admission_s is not None
    return ran.admission_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*CASES, "resume", "s3"])
    chosen = parser.parse_args().only or [*CASES, "resume"]
    say = functools.partial(print, flush=True)
    say(heading())
    with scratch() as folder:
        base = measure(folder, SMALL)
    say(f"the engine's own, and a run on {SMALL.name}: {base.peak_bytes / MB:.0f} MB; above it:")
    for shape in [shape for case in chosen for shape in CASES.get(case, ())]:
        with scratch() as folder:
            ran = measure(folder, shape)
        say(f"{shape.name:40} {above_mb(ran.peak_bytes, base):4.0f} MB, {ran.wall_s:.0f} s in all")
    if "resume" in chosen:
        with scratch() as folder:
            write_input(folder / "in", RESUME)
            num_parts = write_parts(folder, write_job(folder, RESUME))
            ran = run(folder / "job.yaml")
        say(
            f"{RESUME.name} and {num_parts:,} parts, all done but 250 rows: first admission after "
            f"{ran.admission_s:.1f} s ({above_mb(ran.admission_peak_bytes, base):.0f} MB by then), "
            f"finished after {ran.wall_s:.1f} s ({above_mb(ran.peak_bytes, base):.0f} MB)"
        )
    if "s3" in chosen:
        for num_shards in (100, 2_100):
            seconds = list_on_s3(num_shards)
            say(f"{num_shards:,} new shards on moto: first admission after {seconds:.1f} s")


def above_mb(peak_bytes: int, base: Ran) -> float:
    return (peak_bytes - base.peak_bytes) / MB


if __name__ == "__main__":
    main()
