"""The ways to do the job: how each is started, and how to read what it left on disk.

Must not know: how often or in which order they run. `Outcome` is read from files alone, so that it
is what a reader of the output would find, after a kill as after an end.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import polars as pl

from batchinfer.ledger.layout import status_key
from benchmarks.common import ROOT
from benchmarks.peers.events import told
from benchmarks.peers.work import (
    ENVIRONMENT,
    LIMITS,
    MODEL,
    MODEL_ARGUMENTS,
    MODEL_NAME,
    Work,
    flags,
)

ENVIRONMENTS = ROOT / ".cache" / "peers"

#: Token ids of a completion, or how many there are where a peer keeps no ids.
Tokens = tuple[int, ...] | int
Rows = list[tuple[str, Tokens]]


@dataclass(frozen=True, slots=True)
class Contender:
    """`rows`: (id, completion) of what is on disk, one for each time it is there."""

    what: str
    command: Callable[[Work, Path], list[str]]
    rows: Callable[[Path], Rows]
    files: Callable[[Path], list[Path]]  # of the finished output
    times: Callable[[Path], tuple[float, float]]  # first admission and last finish, of one run
    has_begun: Callable[[Path], bool]
    num_computed: Callable[[Path, float], int]  # by the start at that time
    environment: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    is_killed: bool = True

    @property
    def python(self) -> Path:
        return _python(self.environment)


def log_of(output: Path) -> Path:
    """What the last start of a contender printed."""
    return output.with_suffix(".log")


def peer_versions() -> dict[str, str]:
    """Of the peers that are installed in environments of their own."""
    found = {}
    for name in ("ray", "datatrove"):
        folders = [str(path) for path in (ENVIRONMENTS / name).glob("lib/python*/site-packages")]
        for distribution in metadata.distributions(name=name, path=folders):
            found[name] = distribution.version
    return found


def _python(environment: str | None) -> Path:
    return ENVIRONMENTS / environment / "bin" / "python" if environment else Path(sys.executable)


def _module(environment: str | None, name: str, *words: object) -> list[str]:
    return [str(_python(environment)), "-m", f"benchmarks.peers.{name}", *map(str, words)]


def _parquet_rows(paths: list[Path]) -> Rows:
    rows: Rows = []
    for path in paths:
        table = _read(path)
        rows += zip(table["id"], map(tuple, table["token_ids"]), strict=True)
    return rows


def _read(path: Path) -> pl.DataFrame:
    """A file that a kill has torn has no rows."""
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.ComputeError, pl.exceptions.NoDataError):
        return pl.DataFrame(schema=["id", "token_ids", "metadata"])


def _told_times(output: Path) -> tuple[float, float]:
    events = told(output)
    begin_s = [event["at"] for event in events if event["event"] == "begin"][-1]
    return begin_s, [event["at"] for event in events if event["event"] == "end"][-1]


def _told_begun(output: Path) -> bool:
    return any(event["event"] == "begin" for event in told(output))


def _told_computed(output: Path, started_s: float) -> int:
    own = [e["rows"] for e in told(output) if e["event"] == "end" and e["at"] >= started_s]
    return max(own, default=0)


def _llm(what: str, batch_rows: int | None = None) -> Contender:
    def files(output: Path) -> list[Path]:
        return sorted(output.glob("*.parquet"))

    return Contender(
        what=what,
        command=lambda work, output: _module(
            None, "run_llm", work.folder, output, *([batch_rows] if batch_rows else [])
        ),
        rows=lambda output: _parquet_rows(files(output)),
        files=files,
        times=_told_times,
        has_begun=_told_begun,
        num_computed=_told_computed,
    )


def _batchinfer() -> Contender:
    def files(output: Path) -> list[Path]:
        return sorted(output.glob("*.parquet"))

    def rows(output: Path) -> Rows:
        return _parquet_rows(files(output) + sorted(output.glob("_batchinfer/parts/*/*.part")))

    def result(output: Path) -> dict[str, float]:
        last: dict[str, float] = json.loads(log_of(output).read_text().splitlines()[-1])
        return last

    def times(output: Path) -> tuple[float, float]:
        end_s = max(pl.read_parquet(p)["finished_at"].max().timestamp() for p in files(output))  # type: ignore[union-attr]
        return end_s - result(output)["generation_s"], end_s

    def has_begun(output: Path) -> bool:
        # Written when the first batch was admitted, before the first step.
        status = output / status_key(1)
        return status.exists() and '"computing"' in status.read_text()

    return Contender(
        what="batchinfer run",
        command=lambda work, output: [
            *(sys.executable, "-m", "batchinfer", "run", str(work.folder / "job.yaml")),
            *("--set", f"output.path={output}"),
        ],
        rows=rows,
        files=files,
        times=times,
        has_begun=has_begun,
        num_computed=lambda output, started_s: int(result(output)["rows_computed"]),
    )


def _batchinfer_run_batch() -> Contender:
    """The same file of requests that `vllm run-batch` gets."""

    def results(output: Path) -> Path:
        return output / "out.jsonl.batchinfer" / "results"

    def files(output: Path) -> list[Path]:
        return sorted(output.glob("out.jsonl"))

    def rows(output: Path) -> Rows:
        if files(output):
            return _answered(files(output))
        found: Rows = []  # what a second start goes on with
        for path in (
            *results(output).glob("*.parquet"),
            *results(output).glob("_batchinfer/parts/*/*.part"),
        ):
            table = pl.read_parquet(path)
            found += zip(table["custom_id"], map(tuple, table["token_ids"]), strict=True)
        return found

    def result(output: Path) -> dict[str, float]:
        last: dict[str, float] = json.loads(log_of(output).read_text().splitlines()[-1])
        return last

    def times(output: Path) -> tuple[float, float]:
        finished = pl.read_parquet(results(output) / "requests.parquet")["finished_at"]
        end_s = finished.max().timestamp()  # type: ignore[union-attr]
        return end_s - result(output)["generation_s"], end_s

    def has_begun(output: Path) -> bool:
        status = results(output) / status_key(1)
        return status.exists() and '"computing"' in status.read_text()

    def command(work: Work, output: Path) -> list[str]:
        job = work.job()
        sets = [("model", job["model"]), ("engine", job["engine"]), ("packing", job["packing"])]
        return [
            *(sys.executable, "-m", "batchinfer", "run-batch"),
            *("-i", str(work.folder / "requests.jsonl"), "-o", str(output / "out.jsonl")),
            *("--model", str(MODEL), "--served-model-name", MODEL_NAME),
            *("--chat-template", str(work.folder / "chat_template.jinja")),
            *(word for key, of in sets for word in ("--set", f"{key}={json.dumps(of)}")),
        ]

    return Contender(
        what="batchinfer run-batch",
        command=command,
        rows=rows,
        files=files,
        times=times,
        has_begun=has_begun,
        num_computed=lambda output, started_s: int(result(output)["rows_computed"]),
    )


def _answered(paths: list[Path]) -> Rows:
    """(custom_id, tokens) of files of answers."""
    found: Rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            answer = json.loads(line)
            choice = answer["response"]["body"]["choices"][0]
            found.append((answer["custom_id"], tuple(choice["token_ids"])))
    return found


def _run_batch(what: str, more: list[str], variables: Mapping[str, str], note: str) -> Contender:
    def rows(output: Path) -> Rows:
        return _answered(files(output))

    def files(output: Path) -> list[Path]:
        return sorted(output.glob("out.jsonl"))

    def command(work: Work, output: Path) -> list[str]:
        return [
            *_module("server", "run_batch", output),
            *("-i", str(work.folder / "requests.jsonl"), "-o", str(output / "out.jsonl")),
            *("--model", str(MODEL), "--served-model-name", MODEL_NAME),
            *("--chat-template", str(work.folder / "chat_template.jinja")),
            *flags(MODEL_ARGUMENTS),
            *more,
        ]

    return Contender(
        what=what,
        command=command,
        rows=rows,
        files=files,
        times=_told_times,
        has_begun=_told_begun,
        num_computed=_told_computed,
        environment="server",
        variables=variables,
        note=note,
        is_killed=bool(more),  # once is enough: it is one program, with the same output
    )


def _ray() -> Contender:
    def files(output: Path) -> list[Path]:
        return sorted((output / "rows").glob("*.parquet"))

    def times(output: Path) -> tuple[float, float]:
        table = pl.read_parquet(files(output), columns=["begin_s", "end_s"])
        return table["begin_s"].min(), table["end_s"].max()  # type: ignore[return-value]

    def num_computed(output: Path, started_s: float) -> int:
        table = pl.read_parquet(files(output), columns=["begin_s"])
        return table.filter(pl.col("begin_s") >= started_s).height

    return Contender(
        what="Ray Data LLM",
        command=lambda work, output: _module("ray", "run_ray", work.folder, output),
        rows=lambda output: _parquet_rows(files(output)),
        files=files,
        times=times,
        has_begun=_told_begun,
        num_computed=num_computed,
        environment="ray",
        # It would keep a token in the home folder, and report usage.
        variables=ENVIRONMENT | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
    )


def _datatrove() -> Contender:
    def files(output: Path) -> list[Path]:
        return sorted((output / "rows").glob("*.parquet"))

    def rows(output: Path) -> Rows:
        found: Rows = []
        for path in files(output):
            table = _read(path)
            for row_id, fields in table.select("id", "metadata").iter_rows():
                found.append((row_id, fields["rollout_results"][0]["num_tokens"]))
        for path in sorted((output / "checkpoint").glob("*/chunk_*.jsonl")):
            for line in path.read_text().splitlines():
                document = json.loads(line)
                tokens = document["metadata"]["rollout_results"][0]["num_tokens"]
                found.append((document["id"], tokens))
        return found

    def command(work: Work, output: Path) -> list[str]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        server = _python("server")
        return _module("datatrove", "run_datatrove", work.folder, output, server, port)

    return Contender(
        what="datatrove on vllm serve",
        command=command,
        rows=rows,
        files=files,
        times=_told_times,
        has_begun=_told_begun,
        num_computed=_told_computed,
        environment="datatrove",
        note="token counts compared, it keeps no ids",
    )


CONTENDERS = {
    "one_call": _llm("one LLM.generate (upper bound)"),
    "batchinfer": _batchinfer(),
    "batchinfer_run_batch": _batchinfer_run_batch(),
    "batches_256": _llm("LLM.generate in batches of 256", 256),
    "batches_64": _llm("LLM.generate in batches of 64", 64),
    "run_batch": _run_batch(
        "vllm run-batch, as shipped", [], {}, "128 sequences, 2,048 tokens, compiled"
    ),
    "run_batch_equal": _run_batch("vllm run-batch, equal limits", flags(LIMITS), ENVIRONMENT, ""),
    "ray": _ray(),
    "datatrove": _datatrove(),
}
BASE = "one_call"
