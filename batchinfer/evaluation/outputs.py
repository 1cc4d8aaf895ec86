"""A finished output as an evaluation reads it: whole tables of it, and who computed them how.

Must not know: what is measured. Writes nothing. Invariant: of an output that is not whole nothing
is read, so no figure is of a part of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import DEFAULT_ENGINE
from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.intervals import Float64Array
from batchinfer.ledger import layout, named_if_damaged, read_facts, records, survey
from batchinfer.runner.start import open_location
from batchinfer.storage import Store, is_s3
from batchinfer.tasks.scoring_windows import MAX_LOGPROB

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Output:
    """`job`: the resolved one; `model`: what it became (dtype, quantization, digests of files)."""

    store: Store
    keys: Sequence[str]  # of the finished files, in order
    job: Mapping[str, Any]
    model: Mapping[str, Any]
    rows_failed: int

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def task(self) -> str:
        return str(self.job.get("task", "generate"))

    @property
    def engine_name(self) -> str:
        return str((self.job.get("engine") or {}).get("name", DEFAULT_ENGINE))

    @property
    def engine(self) -> Mapping[str, Any]:
        """What computed the last of its rows, as the engine said of itself."""
        facts = read_facts(self.store, self.keys[-1]) or {}
        return dict(facts.get("engine") or {})

    @property
    def loaded(self) -> Mapping[str, Any]:
        """What the engine says of the layers that it holds; of one part where there are several."""
        return dict((self.engine.get("extra") or {}).get("layers") or {})

    @property
    def num_parts(self) -> int:
        """Of how many parts of the model `loaded` is one."""
        return int((self.engine.get("extra") or {}).get("tensor_parallel_size") or 1)

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """One for each finished file, in order; rows in order of (row, sample)."""
        for key in self.keys:
            with self.store.open(key) as source:
                yield _read(source, self.store.url_of(key), columns)

    def tokens_per_s(self) -> float | None:
        """Result tokens of all its runs by the time in which they computed them; None: unknown."""
        tokens, seconds = 0, 0.0
        for info in self.store.list(layout.STATUS_PREFIX):
            record = records.read_status(self.store, info.key)
            if record is not None:
                # The second is what earlier versions called it, whatever the task.
                tokens += int(record.get("result_tokens", record.get("completion_tokens")) or 0)
                seconds += float(record.get("generation_s") or 0.0)
        return tokens / seconds if tokens and seconds > 0 else None


def _read(source: BinaryIO, url: str, columns: Sequence[str]) -> pa.Table:
    with named_if_damaged(url):
        file = pq.ParquetFile(source, pre_buffer=False)
        if missing := [c for c in columns if file.schema_arrow.names.count(c) != 1]:
            raise ConfigError(
                f"{url} does not have {', '.join(missing)} as one column each, only "
                f"{', '.join(file.schema_arrow.names)}"
            )
        return file.read(columns=list(columns))


def read_output(location: str) -> Output:
    """`location`: an output's folder or s3:// location, the job file that names it, or the work
    folder of a measurement.

    Raises ConfigError if there is none, or one that is not complete.
    """
    inside = Path(location) / "output"
    if not is_s3(location) and (inside / layout.JOB_KEY).is_file():
        location = str(inside)
    store = open_location(location)
    record = records.read_job(store)
    if record is None:
        raise ConfigError(f"{store.url} is not an output of batchinfer: no {layout.JOB_KEY} in it")
    success = records.read_success(store)
    keys = sorted(survey(store).finished)
    if success is None or not keys:
        raise ConfigError(
            f"{store.url} is not complete: run its job to the end first (`batchinfer status` says "
            "what is missing)"
        )
    return Output(
        store=store,
        keys=keys,
        job=record["job"],
        model=record.get("ingredients", {}).get("model", {}),
        rows_failed=int(success.get("rows_failed", 0)),
    )


def of_task(ways: Mapping[str, _T], output: Output) -> _T:
    """The one of `ways`, by task, that serves the output. Raises ConfigError if none does."""
    if output.task not in ways:
        raise ConfigError(
            f"{output.url} is an output of task {output.task}, and only outputs of "
            f"{' or '.join(ways)} can be evaluated so"
        )
    return ways[output.task]


def logprobs_of(output: Output, table: pa.Table) -> tuple[Float64Array, Float64Array]:
    """(sum of logprobs, scored tokens) of each row, none of which failed.

    Raises InputError for a sum that no model gives: what reads as a number would be a figure, and
    null a perplexity of 1. Runs write none, but files are damaged and other versions were laxer.
    """
    num_tokens = _floats(table["num_scored_tokens"].fill_null(0))
    logprobs = _floats(table["cumulative_logprob"].fill_null(math.nan))
    logprobs = np.where(num_tokens == 0, 0.0, logprobs)
    is_bad = ~(np.isfinite(logprobs) & (logprobs <= MAX_LOGPROB * num_tokens))
    if is_bad.any():
        at = int(np.flatnonzero(is_bad)[0])
        raise InputError(
            f"row {table['row'][at]} of {output.url}: the log-probability of its "
            f"{int(num_tokens[at])} tokens is {table['cumulative_logprob'][at]}, which no model "
            "gives: the file is damaged, run its job again with --restart"
        )
    return logprobs, num_tokens


def _floats(column: pa.ChunkedArray) -> Float64Array:
    numbers: Float64Array = column.to_numpy().astype(np.float64)
    return numbers


def refuse_failed(output: Output) -> None:
    """Raise InputError if a row is an error: a mean over the others would be of another text."""
    if not output.rows_failed:
        return
    for table in output.tables(["row", "error_type", "error_message"]):
        for row in table.to_pylist():
            if row["error_type"] is not None:
                raise InputError(
                    f"{output.rows_failed} rows of {output.url} failed, such as row {row['row']} "
                    f"({row['error_type']}): {row['error_message']}. No figure is given without "
                    "them: fix the cause, then compute them again, with `batchinfer run "
                    "--retry-failed` or by starting the same measurement again"
                )
