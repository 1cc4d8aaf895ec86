"""`plan`: what a run would do, as text: rows, prompt lengths, batches, how much is done.

With --measure also how long it would take: some rows are really run, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

import click
import numpy as np

from batchinfer.cli.common import Looked, look_at, seen
from batchinfer.cli.measure import show_forecast
from batchinfer.config import load_job
from batchinfer.errors import ConfigError
from batchinfer.forecast.predict import Rest
from batchinfer.forecast.sample import Sample, read_sample
from batchinfer.ledger import Results
from batchinfer.runner.decide import Restart
from batchinfer.telemetry import StartUp

_BAR_WIDTH = 40
_NUM_BINS = 12


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line asks for."""

    max_rows: int | None  # to tokenize, None: none
    num_measured: int | None = None  # rows to run, None: no model
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class _Done:
    """Results that are durable already."""

    num_finished: int  # in finished files
    num_in_parts: int
    finished: Set[str]  # shards

    @property
    def num_results(self) -> int:
        return self.num_finished + self.num_in_parts


def plan_job(path: str, sets: tuple[str, ...], options: PlanOptions) -> None:
    looked = look_at(load_job(path, sets).job, path)
    job, task = looked.job, looked.start.task
    if options.num_measured is not None and task.demand.wants != "completion":
        raise ConfigError(
            f"plan --measure forecasts how long completions become, and task: {job.task} generates "
            f"none: run some rows with --limit, which count, and read {task.counts[0]}_per_s in "
            "the last line"
        )
    shards = [(s, f.num_rows) for s, f in zip(looked.shards, looked.footers, strict=True)]
    num_rows = sum(footer.num_rows for footer in looked.footers)
    window_rows = job.packing.window_rows
    num_windows = sum(math.ceil(footer.num_rows / window_rows) for footer in looked.footers)
    done = _done(looked)
    # How many rows of a shard pass the filter is known once its file is finished.
    num_left = sum(size for shard, size in shards if shard.name not in done.finished)
    num_results = num_left * task.num_samples + done.num_finished
    note = " before the filter" if looked.row_filter else ""
    click.echo(
        f"input    {len(looked.shards):,} shards, {num_rows:,} rows{note}, {num_windows:,} windows"
    )
    click.echo(f"results  {num_results:,} to compute in all ({task.num_samples} a row)")
    share = done.num_results / num_results if num_results else 1.0
    click.echo(
        f"done     {done.num_results:,} ({share:.0%}) {_bar(share)}  "
        f"{len(done.finished):,} finished files"
    )
    kind, spec = looked.start.kind, looked.start.spec
    for line in kind.describe_memory(spec):
        click.echo(f"memory   {line}")
    if options.max_rows is None or num_rows == 0:
        return
    if options.num_measured is not None:
        shards = [(shard, size) for shard, size in shards if shard.name not in done.finished]
        num_rows = sum(size for _, size in shards)
        if num_rows * task.num_samples <= done.num_in_parts:
            click.echo("left     nothing: every row has its result, so none was run")
            return
        kind.prepare(spec)
    prompter = task.prompter(job, looked.model)
    ready_s = StartUp().now()
    sample = read_sample(
        shards,
        prompter,
        looked.row_filter,
        max_rows=max(options.max_rows, options.num_measured or 0),
        num_prompts=options.num_measured or 0,
    )
    _show_lengths(looked, sample, num_rows)
    if options.num_measured is not None:
        num_expected = round(num_rows * sample.passing_share) * task.num_samples
        rest = Rest(
            num_results=num_expected - done.num_in_parts,
            chunk_rows=min(window_rows, -(-num_rows // len(shards))),
            ready_s=ready_s,
        )
        show_forecast(looked, sample, rest, options.price_per_hour)


def _show_lengths(looked: Looked, sample: Sample, num_rows: int) -> None:
    job = looked.job
    lengths = sample.lengths
    click.echo(
        f"sample   {sample.num_read:,} rows read, {len(lengths):,} prompts, "
        f"{sample.num_errors:,} errors"
    )
    if not len(lengths):
        return
    expected_rows = num_rows * sample.passing_share
    num_batches = math.ceil(expected_rows / job.packing.batch_rows)
    prompt_tokens = float(lengths.mean()) * expected_rows
    tokens = f"tokens   about {prompt_tokens:,.0f} of prompts"
    limits = f"max_model_len {looked.model.max_model_len}"
    task = looked.start.task
    if task.max_tokens is not None:
        max_completion = task.max_tokens * expected_rows * task.num_samples
        tokens += f", at most {max_completion:,.0f} of completions"
        limits += f", max_tokens {task.max_tokens}"
    click.echo(tokens)
    click.echo(
        f"batches  about {num_batches:,} of {job.packing.batch_rows} rows, "
        f"order: {job.packing.order}"
    )
    click.echo(
        f"prompt   min {lengths.min()}, median {int(np.median(lengths))}, "
        f"99 % {int(np.percentile(lengths, 99))}, max {lengths.max()} tokens "
        f"({limits})"
    )
    counts, edges = np.histogram(lengths, bins=min(_NUM_BINS, max(1, int(np.ptp(lengths)))))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        click.echo(f"  {int(low):>7}-{int(high):<7} {_bar(count / counts.max())} {count:,}")


def _bar(share: float) -> str:
    return "█" * round(share * _BAR_WIDTH)


def _done(looked: Looked) -> _Done:
    """Raises what a run would refuse this output for."""
    view, decision = seen(looked.start)
    if view.record is None or isinstance(decision, Restart):
        return _Done(0, 0, frozenset())
    results = Results(looked.store, str(view.record["digest"]))
    names = {shard.name for shard in looked.shards}
    finished = names & view.survey.finished
    totals = [results.totals_of(name) for name in sorted(finished)]
    in_parts = names & view.survey.with_parts - finished
    return _Done(
        num_finished=sum(total.rows for total in totals),
        num_in_parts=sum(results.num_rows_of_parts(name) for name in sorted(in_parts)),
        finished=finished,
    )
