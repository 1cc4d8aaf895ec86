"""`plan --measure`: some of the remaining rows are really run, and predict time, tokens and cost.

Must not know: how a forecast is made. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import click

from batchinfer.cli.quiet_engine import quiet_engine
from batchinfer.cli.warned import held_warnings
from batchinfer.errors import InputError
from batchinfer.forecast.forecast import Interval
from batchinfer.forecast.measure import MIN_ROWS, Measurement, measure
from batchinfer.forecast.predict import Prediction, RemainingWork, predict
from batchinfer.forecast.roof import verdict_of
from batchinfer.forecast.sample import Sample
from batchinfer.runner import WholeProcess
from batchinfer.runner.examine import ExaminedJob
from batchinfer.runner.executor import num_gpu_replicas
from batchinfer.runner.judged import judged_by
from batchinfer.tasks import task_of


def show_forecast(
    looked: ExaminedJob,
    sample: Sample,
    rest: RemainingWork,
    price_per_hour: float | None,
) -> None:
    """Run the sample's prompts and print what the rest takes.

    Raises Stopped, ConfigError, InputError, EngineDied.
    """
    job = looked.job
    if nothing := _why_nothing_is_left(sample, rest):
        click.echo(f"left     nothing: {nothing}")
        return
    if not sample.prompts:
        raise InputError(
            f"none of {sample.num_read:,} rows became a prompt, so there is nothing to measure; "
            "--rows reads more of the input"
        )
    with held_warnings(), quiet_engine() as quiet:
        measurement = measure(
            job, looked.model, sample.prompts, quiet.stop, WholeProcess(), sample.own
        )
    # On a CPU several share the cores that the one measured had.
    num_replicas = num_gpu_replicas(job, looked.start.kind)
    found = predict(job, sample, rest, measurement, num_replicas)
    _show_measurement(measurement, len(sample.prompts), found)
    if sample.num_duplicates and job.packing.deduplicate and task_of(job).is_repeatable:
        click.echo(
            f"         {sample.num_duplicates:,} of {len(sample.lengths):,} prompts read also "
            "occur in other rows: a window computes them once, the forecast counts each"
        )
    _show_work(found, rest.num_results)
    click.echo(
        f"time     about {_range(found.total_s, _duration)}: {_duration(found.start_s)} to start, "
        f"{_duration(found.generation_s.expected)} to generate, {_duration(found.close_s)} to end"
    )
    verdict = verdict_of(measurement, found, judged_by(looked.start, measurement.facts))
    if verdict is not None:
        click.echo(f"verdict  about {verdict}")
    if price_per_hour is not None:
        cost = found.cost(price_per_hour)
        click.echo(f"cost     about {_range(cost, _money)} at {price_per_hour:g} an hour")


def _why_nothing_is_left(sample: Sample, rest: RemainingWork) -> str:
    if not sample.passing_share:
        return f"none of {sample.num_read:,} rows read passes the filter, no row was run"
    return "every row has its result, so none was run" if rest.num_results <= 0 else ""


def _show_measurement(measurement: Measurement, num_rows: int, found: Prediction) -> None:
    click.echo(
        f"ran      {num_rows:,} rows in {measurement.generation_s:.1f} s, up to "
        f"{measurement.max_running:,} sequences at a time"
    )
    if found.is_guess(num_rows):
        click.echo(f"         fewer than {MIN_ROWS} rows: what follows is a guess")
    if (width := found.extrapolated_width(measurement, num_rows)) is not None:
        click.echo(
            f"         a run has up to {width:,} at a time: their cost is extrapolated, "
            "more rows narrow the estimate"
        )


def _show_work(found: Prediction, num_results: int) -> None:
    on = f" on {found.num_replicas} devices at once" if found.num_replicas > 1 else ""
    click.echo(f"left     {num_results:,} results to compute{on}")
    click.echo(
        f"tokens   about {found.prompt_tokens:,.0f} of prompts, "
        f"{_range(found.completion_tokens, '{:,.0f}'.format)} of completions"
    )
    click.echo(
        f"speed    {found.completion_tokens_per_s:,.0f} completion tokens/s, "
        f"{found.tokens_per_s:,.0f} tokens/s with those of prompts"
    )


def _range(estimate: Interval, shown: Callable[[float], str]) -> str:
    expected, low, high = map(shown, (estimate.expected, estimate.low, estimate.high))
    return expected if low == high else f"{expected} ({low} to {high})"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
