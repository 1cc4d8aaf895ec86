"""`validate` and `explain`: what can be said of a job without a model in memory and without
writing.
"""

from __future__ import annotations

import click

from batchinfer.cli.common import look_at
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
from batchinfer.runner.all_ids import look_at_ids
from batchinfer.runner.examine import ExaminedJob, accept
from batchinfer.runner.first_rows import check_first_rows

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
        _show_ids(looked, column)


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


def _show_ids(looked: ExaminedJob, column: str) -> None:
    found = look_at_ids(looked.shards, column, looked.carried)
    if found is None:
        return
    repeated = f"{found.num_repeated:,} values that occur more than once"
    click.echo(f"ids      {found.num_nulls:,} null, {repeated}")
    for text in found.places:
        click.echo(f"         {text}")
    if found.num_nulls or found.num_repeated:
        click.echo(
            "         results stay unambiguous by (shard, row); the ids alone do not identify a row"
        )
