"""`init` and its options. Its work is imported when it is called."""

from __future__ import annotations

from typing import Any

import click

from batchinfer.cli.options import TextCommand
from batchinfer.cli.source import JOB_OPTIONS, MORE_OPTIONS, setting_options, take

_OPTIONS = (*JOB_OPTIONS, *MORE_OPTIONS)


def _init(job: str, sets: tuple[str, ...], yes: bool, **given: Any) -> None:
    """Ask what a job needs, and write the job file JOB. [default: job.yaml]

    Each question has a default, taken from what is found in the current folder and in the input and
    the model that are named. What is given by an option is not asked. Nothing is computed.
    """
    from batchinfer.cli.guide import Guide

    Guide(job, sets, take(given, _OPTIONS), takes_defaults=yes).run()


_yes = click.option("-y", "--yes", is_flag=True, help="Take the defaults instead of asking.")
_job = click.argument("job", default="job.yaml", type=click.Path(dir_okay=False))
init: click.Command = click.command(
    "init", cls=TextCommand, short_help="Write a job file, question by question."
)(_job(setting_options(_yes(_init), _OPTIONS)))
