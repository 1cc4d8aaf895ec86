"""`validate` and `explain`: what can be said of a job without a model in memory and without
writing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import numpy as np
import pyarrow as pa

from batchinfer.cli.common import ExaminedJob, accept, look_at
from batchinfer.cli.source import JobSource
from batchinfer.config import Job, explain, written
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import InputError
from batchinfer.quantization import (
    describe_auto_dtype,
    for_this_machine,
    kv_cache_record,
    kv_cache_why_not,
    record_of,
)
from batchinfer.runner.first_rows import check_first_rows
from batchinfer.source import ShardReader, cast_column, plain_type, type_for_polars, with_valid_text

if TYPE_CHECKING:
    import polars as pl

_MAX_SHOWN_IDS = 20
_VALUE_WIDTH = 32  # a longer value pushes only its own origin aside


def explain_job(source: JobSource) -> None:
    """Print key, value and origin of each setting, then what the named quantization means here.

    Without a job file print one: what the options say.
    """
    loaded = source.load()
    if source.path is None:
        click.echo(written(loaded.settings), nl=False)
        return
    rows = explain(loaded)
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(_VALUE_WIDTH, max(len(value) for _, value, _ in rows))
    for key, value, origin in rows:
        click.echo(f"{key:<{key_width}}  {value:<{value_width}}  {origin}".rstrip())
    model = loaded.job.model
    machine = engine_kind(loaded.job.engine.name).machine()
    if model.resolved_dtype == "auto":
        click.echo(f"\nmodel.dtype: {describe_auto_dtype(machine)}")
    if (name := model.quantization) != "auto":
        can_run, text = for_this_machine(record_of(name), machine)
        click.echo(
            f"\n{name}: {record_of(name).meaning}. {'Here: ' if can_run else 'Not here: '}{text}"
        )
    if model.kv_cache_dtype != "auto":
        record = kv_cache_record(model.kv_cache_dtype)
        reason = kv_cache_why_not(record, machine, None)
        click.echo(
            f"\nKV cache {record.name}: {record.meaning}, {record.bits} bits. "
            f"{f'Not here: {reason}' if reason else 'Works here'}"
        )


def validate_job(source: JobSource, *, ids: bool) -> None:
    """Raises ConfigError or InputError for what `run` would refuse."""
    looked = check_job(source.load().job, source.path, source.title)
    if ids:
        column = looked.job.input.id_column
        if column is None:
            raise InputError(
                "--ids needs input.id_column; without it the id is shard and row number"
            )
        _validate_ids(looked, column)


def check_job(job: Job, job_path: str | None, title: str) -> ExaminedJob:
    """Check all that can be checked without a model in memory, and print what it is.

    `job_path` None: no file says the job. Raises ConfigError or InputError.
    """
    looked = look_at(job, job_path)
    accept(looked)
    looked.start.kind.check_fit(looked.start.spec)
    rows = [footer.num_rows for footer in looked.footers]
    check_first_rows(looked.start, list(zip(looked.shards, rows, strict=True)))
    click.echo(f"job      {title}: ok")
    click.echo(
        f"model    {looked.model.path}: {looked.model.dtype}, "
        f"quantization {looked.model.quantization}, max_model_len {looked.model.max_model_len}"
    )
    for note in looked.model.notes:
        click.echo(f"         {note}")
    before = " before the filter" if looked.row_filter is not None else ""
    click.echo(f"input    {len(looked.shards)} shards, {sum(rows):,} rows{before}")
    click.echo(f"output   {looked.store.url}")
    return looked


def _validate_ids(looked: ExaminedJob, column: str) -> None:
    """Nulls and duplicates of the id column. Memory: 8 bytes a row (a hash of each id)."""
    hashes = []
    num_nulls = 0
    for shard in looked.shards:
        with ShardReader(shard, [column], None) as reader:
            for block in reader.blocks(0, reader.num_rows):
                values = _comparable(block.table.column(column), looked.carried)
                num_nulls += values.null_count()
                hashes.append(values.drop_nulls().hash().to_numpy())
    if not hashes:
        return
    unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = unique[counts > 1]
    click.echo(f"ids      {num_nulls:,} null, {len(repeated):,} values that occur more than once")
    for text in _places_of(looked, column, repeated):
        click.echo(f"         {text}")
    if num_nulls or len(repeated):
        click.echo(
            "         results stay unambiguous by (shard, row); the ids alone do not identify a row"
        )


def _comparable(ids: pa.ChunkedArray, carried: pa.Schema | None) -> pl.Series:
    """Ids in the type that all shards have in common, where polars knows it, else as text."""
    import polars as pl

    kind = plain_type(carried.field("id").type) if carried is not None else ids.type
    try:
        values = cast_column(ids, kind)
        is_text = pa.types.is_temporal(kind) or pa.types.is_decimal(kind)
        values = cast_column(values, pa.string() if is_text else type_for_polars(kind))
        return pl.Series(with_valid_text(values)[0])
    except (
        ValueError,
        pa.ArrowException,
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
    ) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--ids: ids of the type {kind} cannot be compared: {reason}") from None


def _places_of(looked: ExaminedJob, column: str, repeated: np.ndarray) -> list[str]:
    """The first places of repeated ids, as "shard:row id"."""
    places: list[str] = []
    if not len(repeated):
        return places
    for shard in looked.shards:
        with ShardReader(shard, [column], None) as reader:
            for block in reader.blocks(0, reader.num_rows):
                values = _comparable(block.table.column(column), looked.carried)
                is_repeated = (
                    np.isin(values.hash().to_numpy(), repeated) & values.is_not_null().to_numpy()
                )
                for index in np.flatnonzero(is_repeated).tolist():
                    places.append(f"{shard.name}:{int(block.rows[index])} {values[index]!r}")
                    if len(places) == _MAX_SHOWN_IDS:
                        return [*places, "…"]
    return places
