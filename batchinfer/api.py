"""The Python door: run a job, and read what is finished, from a program of yours.

    import batchinfer

    outcome = batchinfer.run("jobs/summarize.yaml")
    results = batchinfer.scan(outcome.output).collect()

Must not know: click, terminals. Invariant: nothing here touches what a whole process has but once
(signals, stdio, the garbage collector, the allocator), so that several runs fit into one program.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import Job, job_from, load_job
from batchinfer.errors import BatchInferError, ConfigError, exit_code_of
from batchinfer.ledger import layout, named_if_damaged, read_schema, records, survey
from batchinfer.runner import Host, Run, RunOptions
from batchinfer.runner.carried import recorded_schema
from batchinfer.runner.start import open_location
from batchinfer.sink import batch_for_polars, output_schema, schema_for_polars
from batchinfer.storage import Store
from batchinfer.tasks import task_of
from batchinfer.telemetry import Clock, Counters, Outcome, StartUp

if TYPE_CHECKING:
    import polars as pl

_BATCH_ROWS = 8192
_BUG = 1
_OVERRIDES = "overrides"


def run(
    job: str | PathLike[str] | Mapping[str, Any] | Job,
    *,
    limit: int | None = None,
    slice: tuple[int, int] | None = None,
    restart: bool = False,
    retry_failed: bool = False,
    join: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Outcome:
    """Compute every row of a job that has no result yet, as `batchinfer run` does.

    `job`: a job file's path, its content as a dict, or a `Job`. A path takes the environment's
    overrides into account as the command does, the others do not. The keywords are the command's
    options: `limit` rows at most; `slice` (i, n): every n-th input file from the i-th, i from 1;
    `join`: share the output with other runs that join it, and end when it is complete;
    `overrides`: dotted key -> value, such as `{"sampling.max_tokens": 64}`; a dict for a section
    changes the keys that it has.

    Returns how it ended: `status` is "complete" or "partial" (another slice, or rows beyond
    `limit`, are missing); `exit_code` is 0, or 3 for a complete output with more failed rows than
    `limits.max_failed_fraction`. Raises ConfigError for a job, model or input that cannot be run,
    TransientError (LeaseHeld, MemoryHeld, EngineDied, ...) for what another start may get over,
    Stopped when `limits.max_seconds` is over, RepeatedDeath for rows that ended two runs. Finished
    rows are durable whatever is raised: call it again.
    """
    _check_flags(restart=restart, retry_failed=retry_failed, join=join)
    if restart and slice is not None:
        raise ConfigError("restart concerns the whole output: use it without slice")
    if slice is not None and not _is_slice(slice):
        raise ConfigError(f"slice {slice!r} is not (i, n), two whole numbers with 1 <= i <= n")
    if limit is not None and not (_is_whole(limit) and limit >= 1):
        raise ConfigError(f"limit {limit!r} is not a whole number of at least 1")
    parsed = _parsed(job, {} if overrides is None else overrides)
    slice = None if slice is None else (slice[0], slice[1])
    options = RunOptions(limit, slice, restart, retry_failed, join)
    if clash := options.clash_with_join:
        raise ConfigError(f"{clash[0]} concerns {clash[1]}: use it without join")
    host = Host(Counters(Clock()), startup=StartUp(process_age_s=0.0))
    host.stop.set_max_seconds(parsed.limits.max_seconds)
    started = Run(parsed, options, host)
    exit_code = _BUG
    try:
        outcome = started.run()
        exit_code = outcome.exit_code
        return outcome
    except BatchInferError as error:
        exit_code = exit_code_of(error)
        raise
    finally:
        with contextlib.suppress(BatchInferError):  # the status file: what is raised counts
            started.end(exit_code)


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_slice(value: object) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(map(_is_whole, value)) and 1 <= value[0] <= value[1]


def _parsed(
    job: str | PathLike[str] | Mapping[str, Any] | Job, overrides: Mapping[str, Any]
) -> Job:
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f'overrides must be a dict such as {{"sampling.max_tokens": 64}}, not {overrides!r}'
        )
    sets = [f"{key}={_json(key, value)}" for key, value in overrides.items()]
    if isinstance(job, str | PathLike):
        return load_job(job, sets, sets_name=_OVERRIDES).job
    if isinstance(job, Job):
        if not sets:
            return job
        job = job.model_dump(mode="json")
    if not isinstance(job, Mapping):
        raise ConfigError(
            f"job must be a job file's path, its content as a dict, or a Job, not {job!r}"
        )
    return job_from(job, sets, sets_name=_OVERRIDES)


def _json(key: object, value: object) -> str:
    if not isinstance(key, str) or "=" in key:
        raise ConfigError(f"overrides: {key!r} is not a dotted key such as 'sampling.max_tokens'")
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides: {key}: {error}; give text, numbers, lists, dicts") from None


def scan(output: str | PathLike[str]) -> pl.LazyFrame:
    """The rows of all finished files of an output, lazily, in input order.

    `output`: its folder or `s3://` location, or the job file that names it, which also says how to
    reach the store. The columns are those of docs/start.md, also before the first file is finished.
    In order: shards by name, in each shard by (row, sample). Rows of shards that are still being
    computed are not among them. Instants are in UTC where polars does not know their zone, such as
    +05:30, and decimals of more than 38 digits are text. Raises ConfigError if there is no output.
    """
    import polars as pl

    if not isinstance(output, str | PathLike) or "\0" in fspath(output):
        raise ConfigError(f"output must be a folder, an s3:// location or a job, not {output!r}")
    store = open_location(fspath(output))
    record = records.read_job(store)
    if record is None:
        raise ConfigError(f"{store.url} is not an output of batchinfer: no {layout.JOB_KEY} in it")
    keys = sorted(survey(store).finished)
    schema = read_schema(store, keys[0]) if keys else _schema_of(record)
    readable = schema_for_polars(schema)
    frame = pl.from_arrow(readable.empty_table())
    assert isinstance(frame, pl.DataFrame)
    if not keys:
        return frame.lazy()
    if store.is_local and readable.types == schema.types:
        # Folders of the input may look like partitions or globs: `day=1`, `[a]`.
        paths = [store.url_of(key) for key in keys]
        return pl.scan_parquet(paths, glob=False, hive_partitioning=False)
    return _scan_store(store, keys, frame.schema)


def _scan_store(store: Store, keys: list[str], schema: pl.Schema) -> pl.LazyFrame:
    """Through our store, with its credentials, endpoint and retries; only columns asked for."""
    import polars as pl
    from polars.io.plugins import register_io_source

    def read(
        columns: list[str] | None,
        predicate: pl.Expr | None,
        num_rows: int | None,
        batch_rows: int | None,
    ) -> Iterator[pl.DataFrame]:
        left = num_rows
        for batch in _batches(store, keys, columns, batch_rows or _BATCH_ROWS):
            frame = pl.from_arrow(batch_for_polars(batch))
            assert isinstance(frame, pl.DataFrame)
            if left is not None:
                frame = frame.head(left)
                left -= len(frame)
            yield frame if predicate is None else frame.filter(predicate)
            if left == 0:
                return

    return register_io_source(read, schema=schema)


def _batches(
    store: Store, keys: list[str], columns: list[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    for key in keys:
        with store.open(key) as source, named_if_damaged(store.url_of(key)):
            file = pq.ParquetFile(source, pre_buffer=False)
            yield from file.iter_batches(batch_size=batch_rows, columns=columns)


def _schema_of(record: Mapping[str, Any]) -> pa.Schema:
    """What the first finished file will have."""
    job = job_from(record["job"])
    carried = recorded_schema(record)
    if carried is None:
        carried = pa.schema([(name, pa.string()) for name in ("id", *job.input.keep_columns)])
    return output_schema(list(carried), task_of(job).columns)
