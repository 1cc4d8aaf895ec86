"""`serve` and its options. Its work is imported when it is called."""

from __future__ import annotations

import click

from batchinfer.cli.options import TextCommand
from batchinfer.cli.source import JobSource, job_argument


def _serve(source: JobSource, host: str, port: int, api_key_env: str | None) -> None:
    """Answer OpenAI's clients with the model of JOB.

    Model, quantization, adapter, memory and engine are those that `run` would compute with, and
    what a request does not say is as in the job's `sampling`. Input and output are not touched.
    The first line on stdout says where it listens, once it does; the last is one JSON object that
    says how it ended.
    """
    from batchinfer.cli.serving import ServeProcess

    ServeProcess(source, host, port, api_key_env).run()


_host = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at; 0.0.0.0: whoever reaches this machine may ask.",
)
_port = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0: any that is free.",
)
_key = click.option(
    "--api-key-env",
    metavar="NAME",
    help="Environment variable with a key that every request but GET /health has to bring.",
)
serve: click.Command = click.command(
    "serve", cls=TextCommand, short_help="Answer OpenAI's clients with the model of JOB."
)(job_argument(_host(_port(_key(_serve)))))
