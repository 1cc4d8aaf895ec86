"""What somebody at a terminal may do next: the last lines of a command that ended well.

Nothing where stdout or stderr leads elsewhere: a program reads the line on stdout. Must not know:
how anything is computed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import click

from batchinfer.cli.source import JobSource
from batchinfer.telemetry import Outcome

_REST = "the rest"


def lines_of(steps: Mapping[str, str]) -> list[str]:
    """Commands, and what each does behind it."""
    width = max(map(len, steps), default=0)
    return [f"{command:<{width}}  # {what}" for command, what in steps.items()]


def say_next(out: TextIO, err: TextIO, steps: Mapping[str, str]) -> None:
    """`out`, `err`: the streams of whoever started the command."""
    if not (out.isatty() and err.isatty()):
        return
    for number, line in enumerate(lines_of(steps)):
        text = f"{'      ' if number else 'next: '}{line}\n"
        click.echo(click.style(text, dim=True), file=err, nl=False, color=True)
    err.flush()


def after_init(job: str, *, generates: bool) -> dict[str, str]:
    """`job`: the file that was written. What does not generate has no answers to watch."""
    name = shlex.quote(job)
    steps = {
        f"batchinfer run {name} --limit 20": "twenty rows",
        f"batchinfer show {name}": "look at them",
        f"batchinfer run {name}": _REST,
    }
    if not generates:
        return steps
    return {
        f"batchinfer try {name}": "one row, to watch; nothing is written",
        **steps,
        f"batchinfer serve {name}": "the model for OpenAI's clients",
        f"batchinfer chat {name}": "talk with it",
    }


def after_try(source: JobSource) -> dict[str, str]:
    if source.path is None:
        return {"batchinfer init": "a job file, question by question"}
    return {f"{command('run', source)} --limit 20": "twenty rows; without --limit, all"}


def after_run(source: JobSource, outcome: Outcome, *, is_limited: bool) -> dict[str, str]:
    """Of a run that wrote something, or had nothing to do."""
    if outcome.status == "stopped":
        return {"the same command again": "goes on where it stopped"}
    if outcome.status not in ("complete", "partial"):
        return {}
    steps = {f"batchinfer show {shlex.quote(outcome.output)}": "look at the results"}
    if _is_plain(source):
        steps = {command("show", source): "look at the results"}
    if outcome.status == "partial":
        return steps | ({command("run", source): _REST} if is_limited else {})
    if source.path is not None and "completion_tokens" in outcome.count_names:
        steps[command("serve", source)] = "the model for OpenAI's clients"
        steps |= _to_chat(source)
    return steps


def after_show(output: str, *, is_complete: bool) -> dict[str, str]:
    """`output`: as it was given, which may be a job file."""
    if not Path(output).is_file():
        return {}
    source = JobSource(output, ())
    if not is_complete:
        return {command("run", source): _REST}
    return {command("serve", source): "the model for OpenAI's clients"} | _to_chat(source)


def while_serving(url: str, *, chats: bool, key_variable: str | None) -> list[str]:
    """How to ask a server from another terminal."""
    path, body = "completions", json.dumps({"prompt": "A tool to", "max_tokens": 16})
    if chats:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "hello"}]}'
    key = f' -H "authorization: Bearer ${key_variable}"' if key_variable else ""
    return [
        "ask it from another terminal; Ctrl-C ends it:",
        f"  curl {url}/{path} -H 'content-type: application/json'{key} \\",
        f"    -d '{body}'",
    ]


def after_serve(source: JobSource) -> dict[str, str]:
    return _to_chat(source)


def command(name: str, source: JobSource) -> str:
    """As it has to be typed for the same job."""
    words = ["batchinfer", name, source.path or ""]
    if name != "show":
        words += [word for text in source.sets for word in ("--set", text)]
        words += [word for option, value in source.given for word in option.words(value)]
    return shlex.join(word for word in words if word)


def _to_chat(source: JobSource) -> dict[str, str]:
    """It takes no options but --set."""
    is_possible = source.path is not None and not source.given
    return {command("chat", source): "talk with the model"} if is_possible else {}


def _is_plain(source: JobSource) -> bool:
    """Whether the job file alone says where the results are."""
    return source.path is not None and not source.says("output")
