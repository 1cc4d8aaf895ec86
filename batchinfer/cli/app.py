"""Commands and their options. Each command's work is in a module of its own, imported when it is
called.

Must not know: how anything is done. Starting stays cheap: nothing heavy is imported here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchinfer import __version__
from batchinfer.cli.debug import OWN_LOGS, add_common_options
from batchinfer.cli.evaluations import EVALUATIONS
from batchinfer.cli.init import init
from batchinfer.cli.lazy import Lazy
from batchinfer.cli.options import PRICE, run_options
from batchinfer.cli.renamed import Group
from batchinfer.cli.run_batch import run_batch
from batchinfer.cli.serve import serve
from batchinfer.cli.source import NEEDED_TO_TRY, JobSource, job_argument, setting_options
from batchinfer.errors import ConfigError, short_of
from batchinfer.limits import raise_open_files, shortage
from batchinfer.signals import release_signals

if TYPE_CHECKING:
    from batchinfer.runner.options import RunOptions

#: Commands that handle signals themselves; for the others `cli` restores the default action.
_OWN_SIGNALS = (*OWN_LOGS, "quantize")

_EXIT_CODES = """\b
Exit codes: 0 done or nothing to do, 1 bug or rows that killed two runs in a row,
2 bad job, model or input, 3 too many failed rows, 75 try again later,
129 to 152 stopped by a signal.
"""


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, prog_name="batchinfer")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run a language model over Parquet files, durably. Start with `batchinfer run JOB.yaml`."""
    try:
        Path.cwd()
    except OSError as error:  # deleted meanwhile, or its file system is gone
        raise ConfigError(f"the current directory cannot be used: {error.strerror}") from error
    raise_open_files()
    if (short := shortage()) is not None:  # numpy, given too little, asks for memory forever
        raise short_of("batchinfer", short)
    if context.invoked_subcommand not in _OWN_SIGNALS:
        release_signals()
    if context.invoked_subcommand not in OWN_LOGS:  # theirs are in log and last line
        from batchinfer.cli.warned import PrintedWarnings

        context.obj = context.with_resource(PrintedWarnings(context.invoked_subcommand))


@cli.command()
@job_argument
@run_options
@click.option(
    "--if-running",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="If another run is using the output: exit 75, or skip this start and exit 0.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing unless something fails.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of the log lines on stderr.",
)
def run(
    source: JobSource,
    options: RunOptions,
    if_running: str,
    quiet: bool,
    log_format: str,
) -> None:
    """Compute every row of JOB that has no result yet.

    After an interruption run the same command again: it continues where it stopped. The last line
    on stdout is one JSON object that says how the run ended.
    """
    from batchinfer.cli.run import RunProcess

    RunProcess(
        source,
        options,
        quiet=quiet,
        json_lines=log_format == "json",
        may_skip=if_running == "skip",
    ).run()


@cli.command(short_help="Check JOB without loading a model or writing anything.")
@job_argument
@click.option("--ids", is_flag=True, help="Also read the id column: report nulls and duplicates.")
def validate(source: JobSource, ids: bool) -> None:
    """Check JOB, its model folder, input and output without loading a model or writing anything."""
    from batchinfer.cli.check import validate_job

    validate_job(source, ids=ids)


@cli.command(short_help="Print every setting of JOB and where its value came from.")
@job_argument
def explain(source: JobSource) -> None:
    """Print every setting of JOB with its value and where the value came from.

    Without JOB, print the job file that says the same as the options.
    """
    from batchinfer.cli.check import explain_job

    explain_job(source)


@cli.command(short_help="Show what `run` would do, and what is already done.")
@job_argument
@click.option("--no-tokenizer", is_flag=True, help="Count rows only; do not load the tokenizer.")
@click.option(
    "--rows",
    "max_rows",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Number of rows to tokenize for the histogram, spread over the input.",
)
@click.option(
    "--measure",
    "num_measured",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N of the remaining rows and predict time and tokens. Writes no results.",
)
@click.option(
    "--price-per-hour",
    type=PRICE,
    metavar="PRICE",
    help="With --measure: also predict the cost, at this price for the machine.",
)
def plan(
    source: JobSource,
    no_tokenizer: bool,
    max_rows: int,
    num_measured: int | None,
    price_per_hour: float | None,
) -> None:
    """Show what `run` would do: rows, prompt lengths, batches, and what is already done."""
    from batchinfer.cli.plan import PlanOptions, plan_job

    if num_measured is not None and no_tokenizer:
        raise click.UsageError("--measure runs rows: use it without --no-tokenizer")
    if price_per_hour is not None and num_measured is None:
        raise click.UsageError("--price-per-hour needs --measure")
    options = PlanOptions(
        max_rows=None if no_tokenizer else max_rows,
        num_measured=num_measured,
        price_per_hour=price_per_hour,
    )
    plan_job(source, options)


@cli.command("try", short_help="Run one row, or one prompt, and watch. Writes nothing.")
@partial(job_argument, needed=NEEDED_TO_TRY)
@click.option(
    "--row",
    metavar="N|SHARD:N",
    help="Which row, counted from 0 over the whole input or in one shard. [default: the first]",
)
@click.option(
    "--prompt", metavar="TEXT", help="A text in place of a row; in a chat, the user's message."
)
@click.option("--logprobs", is_flag=True, help="Colour each token by its probability.")
def try_(source: JobSource, row: str | None, prompt: str | None, logprobs: bool) -> None:
    """Show the prompt of one row of JOB as it is sent, then its completion token by token.

    Nothing is written, and JOB's output is not looked at. --prompt needs no input: `batchinfer try
    --model MODEL --prompt TEXT`.
    """
    from batchinfer.cli.trial import TryOptions, try_job

    if row is not None and prompt is not None:
        raise click.UsageError("give --row or --prompt, not both")
    try_job(source, TryOptions(row, prompt, has_logprobs=logprobs))


def _chat(target: str, sets: tuple[str, ...]) -> None:
    """Talk with MODEL, a folder or hub name, or with the model of JOB as its settings say.

    /help lists what can be changed meanwhile. Nothing is written.
    """
    from batchinfer.cli.chat import chat, source_of_target

    chat(source_of_target(target, sets))


cli.command("chat", short_help="Talk with a model.")(
    click.argument("target", metavar="MODEL|JOB")(setting_options(_chat, ()))
)


@cli.command(short_help="Show the state of the runs on an output.")
@click.argument("output", metavar="OUTPUT|JOB")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON lines.")
def status(output: str, as_json: bool) -> None:
    """Show the state of the runs on an output, read from the output alone."""
    from batchinfer.cli.status import show_status

    show_status(output, as_json=as_json)


@cli.command(short_help="Print finished rows of an output.")
@click.argument("output", metavar="OUTPUT|JOB")
@click.option(
    "-n",
    "--rows",
    "max_rows",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of rows to print.",
)
@click.option("--failed", is_flag=True, help="Print only rows that failed.")
@click.option("--json", "as_json", is_flag=True, help="Print all columns, one JSON object per row.")
def show(output: str, max_rows: int, failed: bool, as_json: bool) -> None:
    """Print finished rows of an output, even while it is being computed."""
    from batchinfer.cli.show import show_rows

    show_rows(output, max_rows=max_rows, failed=failed, as_json=as_json)


@cli.command()
@click.option(
    "--write", is_flag=True, help="Rewrite the files in ./schemas instead of printing them."
)
def schema(write: bool) -> None:
    """Print the JSON Schema of the job file (for editors)."""
    from batchinfer.cli.schemas import print_or_write

    print_or_write(write=write)


@cli.command(short_help="Check what this machine and the stores of JOB can do.")
@click.argument("job", required=False, type=click.Path(dir_okay=False))
@click.option("--store", "url", metavar="URL", help="Also test a folder or s3:// location.")
def doctor(job: str | None, url: str | None) -> None:
    """Check what this machine can do: engine, devices, and the stores of JOB or --store."""
    from batchinfer.cli.doctor import examine

    examine(job, url)


def _quantize() -> click.Command:
    from batchinfer.cli.quantization import quantize

    add_common_options(quantize)
    return quantize


for _command in (init, run_batch, serve, *EVALUATIONS):
    cli.add_command(_command)
for _command in (cli, *cli.commands.values()):
    add_common_options(_command)
# Its options are those of every method, whose modules take half of the time of `--help`.
cli.add_command(Lazy("quantize", "Make a quantized checkpoint of an unquantized model.", _quantize))
