"""`plan`: what a run would do, as text: rows, prompt lengths, batches, how much is done."""

from __future__ import annotations

import math

import click
import numpy as np

from batchinfer.checkpoint import Ledger, Survey, layout
from batchinfer.cli.common import Looked, look_at
from batchinfer.config import load_job
from batchinfer.runner.factory import prompter_of
from batchinfer.source import Shard, ShardReader

_BAR_WIDTH = 40
_NUM_BINS = 12
_SAMPLED_BLOCK_ROWS = 512


def plan_job(path: str, sets: tuple[str, ...], *, max_rows: int | None) -> None:
    """`max_rows`: how many rows to tokenize for the histogram, None for none."""
    looked = look_at(load_job(path, sets).job)
    job = looked.job
    num_rows = sum(footer.num_rows for footer in looked.footers)
    window_rows = job.packing.window_rows
    num_windows = sum(math.ceil(footer.num_rows / window_rows) for footer in looked.footers)
    num_done, num_finished = _done(looked)
    num_results = num_rows * job.sampling.n
    note = " before the filter" if looked.row_filter else ""
    click.echo(
        f"input    {len(looked.shards):,} shards, {num_rows:,} rows{note}, {num_windows:,} windows"
    )
    click.echo(f"results  {num_results:,} to compute in all ({job.sampling.n} a row)")
    share = num_done / num_results if num_results else 1.0
    click.echo(
        f"done     {num_done:,} ({share:.0%}) {_bar(share)}  {num_finished:,} finished files"
    )
    if max_rows is None or num_rows == 0:
        return
    lengths, num_errors, num_read = _sample(looked, max_rows)
    _show_lengths(looked, lengths, num_errors, num_read, num_rows)


def _show_lengths(
    looked: Looked, lengths: np.ndarray, num_errors: int, num_read: int, num_rows: int
) -> None:
    job = looked.job
    kept = (len(lengths) + num_errors) / num_read if num_read else 0.0
    click.echo(f"sample   {num_read:,} rows read, {len(lengths):,} prompts, {num_errors:,} errors")
    if not len(lengths):
        return
    expected_rows = num_rows * kept
    num_batches = math.ceil(expected_rows / job.packing.batch_rows)
    prompt_tokens = float(lengths.mean()) * expected_rows
    max_completion = job.sampling.max_tokens * expected_rows * job.sampling.n
    click.echo(
        f"tokens   about {prompt_tokens:,.0f} of prompts, "
        f"at most {max_completion:,.0f} of completions"
    )
    click.echo(
        f"batches  about {num_batches:,} of {job.packing.batch_rows} rows, "
        f"order: {job.packing.order}"
    )
    click.echo(
        f"prompt   min {lengths.min()}, median {int(np.median(lengths))}, "
        f"99 % {int(np.percentile(lengths, 99))}, max {lengths.max()} tokens "
        f"(max_model_len {looked.model.max_model_len}, max_tokens {job.sampling.max_tokens})"
    )
    counts, edges = np.histogram(lengths, bins=min(_NUM_BINS, max(1, int(np.ptp(lengths)))))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        click.echo(f"  {int(low):>7}-{int(high):<7} {_bar(count / counts.max())} {count:,}")


def _bar(share: float) -> str:
    return "█" * round(share * _BAR_WIDTH)


def _done(looked: Looked) -> tuple[int, int]:
    """Results that are durable already, and the number of finished files."""
    if looked.store.stat(layout.JOB_KEY) is None:
        return 0, 0
    from batchinfer.checkpoint import records
    from batchinfer.runner.session import digest_ingredients

    digest = records.digest_of(digest_ingredients(looked.job, looked.model))
    ledger = Ledger(looked.store, {"digest": digest}, looked.job.packing.window_rows)
    survey = ledger.survey()
    finished = [s for s in looked.shards if s.name in survey.finished]
    totals = [ledger.totals_of(shard.name) for shard in finished]
    num_done = sum(t.rows for t in totals if t is not None)
    unfinished = (s for s in looked.shards if s.name not in survey.finished)
    num_done += sum(_done_in_parts(ledger, survey, shard) for shard in unfinished)
    return num_done, len(finished)


def _done_in_parts(ledger: Ledger, survey: Survey, shard: Shard) -> int:
    if shard.name not in survey.with_parts:
        return 0
    return ledger.num_rows_of_parts(shard.name)


def _sample(looked: Looked, max_rows: int) -> tuple[np.ndarray, int, int]:
    """(prompt lengths, rows in error, rows read): blocks from the start of shards spread over the
    input.
    """
    job = looked.job
    prompter = prompter_of(job, looked.model)
    filled = [
        (s, f.num_rows) for s, f in zip(looked.shards, looked.footers, strict=True) if f.num_rows
    ]
    num_shards = max(1, min(len(filled), max_rows // _SAMPLED_BLOCK_ROWS))
    chosen = [filled[i] for i in np.linspace(0, len(filled) - 1, num_shards).astype(int)]
    lengths = []
    num_errors = num_read = 0
    for shard, num_rows in chosen:
        stop = min(num_rows, max(1, max_rows // num_shards))
        num_read += stop
        with ShardReader(shard, list(prompter.columns), looked.row_filter) as reader:
            for block in reader.blocks(0, stop):
                prepared = prompter.prepare(block.table)
                sizes = np.diff(prepared.offsets)
                lengths.append(sizes[sizes > 0])
                num_errors += len(prepared.errors)
    return np.concatenate(lengths) if lengths else np.empty(0, np.int64), num_errors, num_read
