"""Inputs, job files and runs for tests that go through the command line."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import fsspec
import polars as pl
import yaml

from tests.support.forks import Forked, forks, python_path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "jobs" / "demo" / "model"

Process = subprocess.Popen[str] | Forked

#: Columns of an output that may differ between two runs with the same results.
CHANGING_COLUMNS = (
    "queued_s",
    "prefill_s",
    "decode_s",
    "total_s",
    "finished_at",
    "attempt",
    "num_cached_tokens",
    "duplicate_of",
)

#: A fake engine whose runs last long enough to be stopped in the middle.
SLOW = {"step_s": 0.05, "max_num_seqs": 8}


@dataclass
class Ended:
    """A `batchinfer run` that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


_S3_VARIABLES = ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")


@functools.cache
def _bucket_store(endpoint_url: str, key: str, secret: str) -> Any:
    """Kept, as each is a tenth of a second of computing."""
    return fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        endpoint_url=endpoint_url,
        key=key,
        secret=secret,
    )


@dataclass
class Place:
    """Where inputs and outputs of a test are: a folder, or a bucket and how to reach it."""

    root: str
    environ: Mapping[str, str] = field(default_factory=dict)

    def url(self, *names: str) -> str:
        return "/".join([self.root, *names])

    @property
    def is_s3(self) -> bool:
        return self.root.startswith("s3://")

    @property
    def fs(self) -> Any:
        if not self.is_s3:
            return fsspec.filesystem("file")
        return _bucket_store(*(self.environ[f"AWS_{name}"] for name in _S3_VARIABLES))

    def write_parquet(self, name: str, frame: pl.DataFrame, **options: Any) -> None:
        path = self.url(name)
        if not self.is_s3:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self.fs.open(path, "wb") as sink:
            frame.write_parquet(sink, **options)

    def read_parquet(self, name: str) -> pl.DataFrame:
        with self.fs.open(self.url(name), "rb") as source:
            return pl.read_parquet(source.read())

    def names(self, folder: str) -> list[str]:
        """All files below a folder, relative to it."""
        prefix = self.url(folder).removeprefix("s3://")
        if not self.fs.exists(prefix):
            return []
        return sorted(found.removeprefix(prefix).lstrip("/") for found in self.fs.find(prefix))

    def parts(self, output: str = "out") -> list[str]:
        """Parts of an output: rows that are durable, of shards that are not finished."""
        return [name for name in self.names(output) if name.endswith(".part")]


def rows(num_rows: int, *, start: int = 0) -> pl.DataFrame:
    """Rows with an id and a text of varying length."""
    numbers = range(start, start + num_rows)
    return pl.DataFrame(
        {
            "id": [f"row-{n}" for n in numbers],
            "text": [f"{n} " + "word " * (1 + n * 7919 % 23) for n in numbers],
        }
    )


def job(place: Place, output: str = "out", **sections: Any) -> dict[str, Any]:
    """A job over `<place>/in/*.parquet`; sections are merged over the defaults of the tests."""
    settings: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "input": {"path": place.url("in", "*.parquet"), "id_column": "id"},
        "prompt": {"template": "{{ text }}"},
        "model": {"path": str(MODEL)},
        "sampling": {"max_tokens": 16, "logprobs": 1},
        "packing": {"window_rows": 64},
        "checkpoint": {"every_rows": 16, "every_s": 0.2},
        "output": {"path": place.url(output)},
    }
    for name, section in sections.items():
        if isinstance(section, dict) and name not in ("prompt",):
            settings[name] = settings.get(name, {}) | section
        else:
            settings[name] = section
    return settings


def write_job(folder: Path, settings: dict[str, Any], name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(settings))
    return path


class Launch(TypedDict, total=False):
    """How a command is started."""

    place: Place | None
    fake: Mapping[str, Any] | None  # settings of the fake engine
    crash: Mapping[str, Any] | None
    environ: Mapping[str, str] | None
    command: Sequence[str]  # ("run",)
    engine: str  # "fake" (the default) or "real"
    stdout: Any
    ignored: Collection[int]  # signals that the process ignores from its start, as under nohup
    is_fresh: bool  # with imports of its own, where those are what a test is about
    spares: Sequence[int]  # of how many processes that it starts the imports are saved, too


def start(path: Path | str, *arguments: str, **options: Unpack[Launch]) -> Process:
    """Start the command line in a process group of its own."""
    place, ignored = options.get("place"), options.get("ignored", ())
    engine = options.get("engine", "fake")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHINFER", "AWS_"))}
    environment |= {
        "PYTHONPATH": python_path(),
        "FAKE_ENGINE": json.dumps(dict(options.get("fake") or {})),
    }
    environment |= dict(place.environ) if place else {}
    if crash := options.get("crash"):
        environment["CRASH"] = json.dumps(dict(crash))
    environment |= dict(options.get("environ") or {})
    command = [*options.get("command", ("run",)), str(path), *arguments]
    stdout = options.get("stdout", subprocess.PIPE)
    if not options.get("is_fresh") and forks(engine).can_give(environment):
        return forks(engine).fork(
            command, environment, stdout=stdout, ignored=ignored, spares=options.get("spares", ())
        )

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    module = "tests.support.fake_run" if engine == "fake" else "batchinfer"
    return subprocess.Popen(
        [sys.executable, "-m", module, *command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=ROOT,
        preexec_fn=ignore if ignored else None,
    )


def run_python(*arguments: str, spares: Sequence[int] = (), timeout_s: float = 150) -> Ended:
    """Run Python with a file, -m or -c where vLLM has been imported before it begins."""
    process = forks("real").fork(arguments, spares=spares, is_python=True)
    return wait(process, timeout_s)


def run(
    path: Path | str, *arguments: str, timeout_s: float = 150, **options: Unpack[Launch]
) -> Ended:
    """Start and wait."""
    return wait(start(path, *arguments, **options), timeout_s)


def wait(process: Process, timeout_s: float = 150) -> Ended:
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"did not end within {timeout_s} s\n{stdout}\n{stderr}") from None
    return Ended(process.returncode, stdout or "", stderr)


def kill(process: Process, number: int = signal.SIGKILL) -> None:
    """Signal the whole process group, as schedulers do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def results(place: Place, output: str = "out") -> pl.DataFrame:
    """All finished rows, in order of (shard, row, sample)."""
    names = [n for n in place.names(output) if n.endswith(".parquet")]
    frames = [place.read_parquet(f"{output}/{name}") for name in names]
    return pl.concat(frames) if frames else pl.DataFrame()


def stable(frame: pl.DataFrame) -> pl.DataFrame:
    """Without the columns that may differ between two runs."""
    return frame.drop([c for c in CHANGING_COLUMNS if c in frame.columns])


def wait_until(condition: Any, timeout_s: float = 60, what: str = "condition") -> None:
    deadline = time.monotonic() + timeout_s
    begun = time.monotonic()
    while not condition():
        now = time.monotonic()
        if now > deadline:
            raise AssertionError(f"{what} did not come true within {timeout_s} s")
        time.sleep(max(0.02, now - begun))  # a look at a bucket costs: half of the time at most
        begun = time.monotonic()
