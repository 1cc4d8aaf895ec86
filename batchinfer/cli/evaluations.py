"""Commands that evaluate, and their options. Their work is imported when they are called.

Must not know: how anything is done. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from batchinfer.cli.compare import compare
from batchinfer.cli.options import PRICE, TextCommand


@click.command(cls=TextCommand, short_help="Measure the perplexity of a model on a text.")
@click.argument("model")
@click.option(
    "--data",
    default="wikitext2",
    show_default=True,
    metavar="DATA",
    help="wikitext2, a file of text, Parquet with --column, or hub:ORG/NAME/CONFIG/SPLIT.",
)
@click.option("--column", metavar="NAME", help="Column with the text, for Parquet data.")
@click.option(
    "--quantization",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="As model.quantization in a job file; `batchinfer doctor` lists the names.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="As model.dtype in a job file.",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens per window.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens from the start of one window to the start of the next.",
)
@click.option("--max-rows", type=click.IntRange(min=1), help="Measure on the first N windows.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1, max=256),
    metavar="K",
    help="Keep the K most likely tokens at each position: for a reference, or to compare with one.",
)
@click.option(
    "--reference",
    metavar="OUTPUT",
    help="Also compute the KL divergence from this output of a reference model.",
)
@click.option("--label", help="Name of the measurement. [default: the model's and quantization's]")
@click.option("--work", type=click.Path(), help="Folder to keep the output and the record in.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A setting of the job.")
@click.option("--layers", is_flag=True, help="Also print the stored bits of each layer on stderr.")
@click.option("--restart", is_flag=True, help="Delete what was computed first.")
def perplexity(
    model: str,
    label: str | None,
    work: str | None,
    sets: tuple[str, ...],
    layers: bool,
    restart: bool,
    **asked: Any,
) -> None:
    """Measure the perplexity of MODEL, a folder or hub name, and print a record of it as JSON.

    After an interruption run the same command again: it continues where it stopped.
    """
    from batchinfer.cli.perplexity import settings_of, show_perplexity
    from batchinfer.evaluation.record import PerplexityRequest

    label = label or f"{Path(model).name} {asked['quantization']}"
    request = PerplexityRequest(label=label, model=model, settings=settings_of(sets), **asked)
    show_perplexity(request, work, restart=restart, layers=layers)


@click.command(cls=TextCommand, short_help="Compare two finished outputs over the same rows.")
@click.argument("one")
@click.argument("other")
@click.option(
    "--price-per-hour",
    type=PRICE,
    metavar="PRICE",
    help="Price of the machine: also print what a million tokens cost.",
)
def pair(one: str, other: str, price_per_hour: float | None) -> None:
    """Compare the finished outputs ONE and OTHER over the same rows, and print JSON.

    Scored rows: the difference in negative log-likelihood with its interval, KL divergence where
    both have likeliest tokens. Generated rows: how many are the same.
    """
    from batchinfer.evaluation.pair import pair as compared

    click.echo(compared(one, other, price_per_hour=price_per_hour).model_dump_json(indent=2))


@click.command(cls=TextCommand, short_help="Score a finished output against a reference column.")
@click.argument("output", metavar="OUTPUT|JOB")
@click.option("--reference", metavar="COLUMN", help="Kept column with the right completions.")
@click.option("--rouge", is_flag=True, help="Also compute ROUGE-L; needs batchinfer[grade].")
def grade(output: str, reference: str | None, rouge: bool) -> None:
    """Score a finished OUTPUT, and print JSON.

    For completions: the share that equals --reference. For an output of task: score: perplexity.
    """
    from batchinfer.evaluation.grade import grade as graded

    click.echo(graded(output, reference, rouge=rouge).model_dump_json(indent=2))


#: What `app` adds to its own.
EVALUATIONS = (perplexity, compare, pair, grade)
