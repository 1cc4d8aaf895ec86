"""`plan`: what a run would do, as text: rows, prompt lengths, batches, how much is done.

With --measure also how long it would take: some rows are really run, and nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np

from batchinfer.cli.common import look_at
from batchinfer.cli.measure import show_forecast
from batchinfer.cli.source import JobSource
from batchinfer.engine.base import ForeseeingKind
from batchinfer.forecast.measure import check_measurable
from batchinfer.forecast.roof import roof_of
from batchinfer.forecast.sample import Sample, read_sample
from batchinfer.forecast.work import Work, read_work
from batchinfer.runner.examine import ExaminedJob, accept
from batchinfer.runner.executor import num_gpu_replicas
from batchinfer.runner.judged import judged_by
from batchinfer.telemetry import StartUp

_BAR_WIDTH = 40
_NUM_BINS = 12


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line asks for."""

    max_rows: int | None  # to tokenize, None: none
    num_measured: int | None = None  # rows to run, None: no model
    price_per_hour: float | None = None


def plan_job(source: JobSource, options: PlanOptions) -> None:
    looked = look_at(source.load().job, source.path)
    job, task = looked.job, looked.start.task
    if options.num_measured is not None:
        check_measurable(task)
    shards = [(s, f.num_rows) for s, f in zip(looked.shards, looked.footers, strict=True)]
    work = read_work(looked.start, shards, looked.view.survey, accept(looked))
    _show_work(looked, work)
    kind, spec = looked.start.kind, looked.start.spec
    for line in kind.describe_memory(spec):
        click.echo(f"memory   {line}")
    if options.max_rows is None or work.num_rows == 0:
        return
    if options.num_measured is not None:
        if work.is_done:
            click.echo("left     nothing: every row has its result, so none was run")
            return
        kind.prepare(spec)
    prompter = task.prompter(job, looked.model)
    ready_s = StartUp().now()
    sample = read_sample(
        work.shards if options.num_measured is None else work.left,
        prompter,
        looked.row_filter,
        max_rows=max(options.max_rows, options.num_measured or 0),
        num_prompts=options.num_measured or 0,
    )
    is_measured = options.num_measured is not None
    _show_lengths(looked, sample, work.num_rows_left if is_measured else work.num_rows)
    if not is_measured:
        _show_roof(looked, sample, work.num_rows)
    else:
        price = options.price_per_hour
        price = job.limits.price_per_hour if price is None else price
        show_forecast(looked, sample, work.rest(sample, ready_s), price)


def _show_work(looked: ExaminedJob, work: Work) -> None:
    note = " before the filter" if looked.row_filter else ""
    click.echo(
        f"input    {len(looked.shards):,} shards, {work.num_rows:,} rows{note}, "
        f"{work.num_windows:,} windows"
    )
    click.echo(f"results  {work.num_results:,} to compute in all ({work.num_samples} a row)")
    share = work.num_done / work.num_results if work.num_results else 1.0
    click.echo(
        f"done     {work.num_done:,} ({share:.0%}) {_bar(share)}  "
        f"{len(work.finished):,} finished files"
    )


def _show_lengths(looked: ExaminedJob, sample: Sample, num_rows: int) -> None:
    job = looked.job
    lengths = sample.lengths
    click.echo(
        f"sample   {sample.num_read:,} rows read, {len(lengths):,} prompts, "
        f"{sample.num_errors:,} errors"
    )
    if not len(lengths):
        return
    task = looked.start.task
    most = None if task.max_tokens is None else task.max_tokens * task.num_samples
    expected = sample.expected(num_rows, job.packing.batch_rows, most)
    tokens = f"tokens   about {expected.prompt_tokens:,.0f} of prompts"
    limits = f"max_model_len {looked.model.max_model_len}"
    if expected.max_result_tokens is not None:
        tokens += f", at most {expected.max_result_tokens:,.0f} of completions"
        limits += f", max_tokens {task.max_tokens}"
    click.echo(tokens)
    click.echo(
        f"batches  about {expected.num_batches:,} of {job.packing.batch_rows} rows, "
        f"order: {job.packing.order}"
    )
    click.echo(
        f"prompt   min {lengths.min()}, median {int(np.median(lengths))}, "
        f"99 % {int(np.percentile(lengths, 99))}, max {lengths.max()} tokens "
        f"({limits})"
    )
    bins = sample.histogram(_NUM_BINS)
    most_prompts = max(count for count, _, _ in bins)
    for count, low, high in bins:
        click.echo(f"  {low:>7}-{high:<7} {_bar(count / most_prompts)} {count:,}")


def _show_roof(looked: ExaminedJob, sample: Sample, num_rows: int) -> None:
    """The most that this device can do of it; nothing where that cannot be foreseen."""
    kind, spec, task = looked.start.kind, looked.start.spec, looked.start.task
    if not isinstance(kind, ForeseeingKind) or task.max_tokens is None or not len(sample.lengths):
        return
    if (facts := kind.expected_facts(spec)) is None:
        return
    setup = judged_by(looked.start, facts)
    num_replicas = num_gpu_replicas(looked.job, kind)
    num_each = round(num_rows * sample.passing_share / num_replicas) * task.num_samples
    found = roof_of(sample.lengths, num_each, task.max_tokens, facts, setup)
    device = setup.device if num_replicas == 1 else f"{num_replicas} x {setup.device}"
    if found is None:
        why = "its peaks are" if setup.peaks is None else "the model's work is"
        click.echo(f"roof     unknown for {device}: {why} not known before a run")
        return
    click.echo(
        f"roof     {num_replicas * found.tokens_per_s:,.0f} completion tokens/s at most on "
        f"{device}, bound by {found.bound}, if they all have max_tokens"
    )


def _bar(share: float) -> str:
    return "█" * round(share * _BAR_WIDTH)
