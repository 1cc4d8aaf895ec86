"""`run-batch` and its options. Its work is imported when it is called."""

from __future__ import annotations

from typing import Any

import click

from batchinfer.cli.options import TextCommand
from batchinfer.cli.source import JOB_OPTIONS, MORE_OPTIONS, JobSource, setting_options, take

_SETTINGS = tuple(
    option
    for option in (*JOB_OPTIONS, *MORE_OPTIONS)
    if option.name in ("--model", "--quantization")
)


def _run_batch(**given: Any) -> None:
    """Answer the lines of IN, an OpenAI batch file, and write OUT in their order.

    Chats and completions are answered, each as its own body says. A line that cannot be answered is
    in the file of errors. After an interruption run the same command again: nothing that was
    finished is computed again. The last line on stdout is one JSON object that says how it ended.
    """
    from batchinfer.cli.batch_process import BatchProcess

    source = JobSource(None, given.pop("sets"), take(given, _SETTINGS))
    BatchProcess(source, given).run()


_input = click.option(
    "-i",
    "--input",
    "input_",
    required=True,
    metavar="IN",
    help="Lines of requests: .jsonl, or .parquet with the columns custom_id, method, url and body.",
)
_output = click.option("-o", "--output", required=True, metavar="OUT", help="File of the answers.")
_errors = click.option(
    "-e",
    "--errors",
    metavar="FILE",
    help="File of the errors.  [default: OUT with .errors before .jsonl]",
)
_name = click.option(
    "--served-model-name",
    "served_name",
    metavar="NAME",
    help="What lines call the model, besides the path and the name of its folder.",
)
_template = click.option(
    "--chat-template", metavar="NAME|FILE|TEXT", help="As prompt.chat_template of a job."
)
_restart = click.option("--restart", is_flag=True, help="Delete the earlier results of OUT first.")
_retry = click.option("--retry-failed", is_flag=True, help="Ask again what the engine failed at.")
_command = setting_options(_run_batch, _SETTINGS)
for _option in (_retry, _restart, _template, _name, _errors, _output, _input):
    _command = _option(_command)
run_batch: click.Command = click.command(
    "run-batch", cls=TextCommand, short_help="Answer the lines of an OpenAI batch file."
)(_command)
