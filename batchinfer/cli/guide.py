"""`init`: the questions whose answers are a job file, what is shown before each, and the file.

Must not know: how anything is read or checked. Invariants: nothing is written before the whole job
was checked as `validate` does, and no file is overwritten unasked.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from batchinfer.cli.asking import Asker
from batchinfer.cli.check import check_job
from batchinfer.cli.draft import JobDraft
from batchinfer.cli.engines import engine_for
from batchinfer.cli.found import InputLook, find_here, look_at_input
from batchinfer.cli.model_look import ModelLook, look_at_model
from batchinfer.cli.next_steps import after_init, lines_of
from batchinfer.cli.places import explained_places
from batchinfer.cli.source import JobOption, JobSource
from batchinfer.cli.trial import TryOptions, try_job
from batchinfer.config import COMMAND_LINE, name_of, written
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import ConfigError, printable
from batchinfer.prompt import PromptLimit, written_column
from batchinfer.runner.checks import check_schema
from batchinfer.runner.factory import engine_spec
from batchinfer.storage.local_errors import os_errors, why_no_folder
from batchinfer.tasks import task_of

_MAX_TOKENS = 256
_MAX_FOUND = 5


class Guide:
    """Asks, checks and writes."""

    def __init__(
        self,
        path: str,
        sets: tuple[str, ...],
        given: tuple[tuple[JobOption, Any], ...],
        *,
        takes_defaults: bool,
    ) -> None:
        """`given`: options and their values, which are not asked for."""
        self._path = path
        self._draft = JobDraft(sets)
        for option, value in given:
            self._draft.say(option.key, option.make(value), option.name)
        self._asker = Asker(self._draft, takes_defaults=takes_defaults)
        self._width = shutil.get_terminal_size().columns - 2

    def run(self) -> None:
        """Raises ConfigError, InputError, TransientError: nothing is written then."""
        is_new = self._is_new()
        self._name()
        _ = self._draft.job  # what was given is wrong whatever is answered
        here = find_here()
        _say("Which rows? A glob, a folder or a file of Parquet, here or on s3://")
        _show_found(here.inputs)
        look = self._ask_input(next(iter(here.inputs), None))
        _say("Which model? A folder, or a name on the hub")
        _show_found(here.models)
        model = self._ask_model(next(iter(here.models), None))
        self._ask_task()
        self._ask_prompt(look, model)
        self._ask_sampling(model)
        self._ask_id(look)
        _say("Where do the results go? A folder, here or on s3://")
        self._ask_output()
        self._write(_notes(look, model), is_new=is_new)
        self._offer()

    def _is_new(self) -> bool:
        """Raises ConfigError, before a question, for a place where nothing can be written."""
        path = Path(self._path).absolute()
        with os_errors("write", path):
            is_new = not path.exists()
        if problem := why_no_folder(path.parent):
            raise ConfigError(f"cannot write {path}: {problem}")
        nearest = next(folder for folder in path.parents if folder.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write {path}: check the owner and mode of {nearest}")
        if is_new:
            return True
        if not path.is_file():
            raise ConfigError(f"{path} is no regular file: give another name")
        if self._asker.confirm(f"{self._path} exists. Overwrite it?", default=False):
            return False
        raise ConfigError(
            f"{self._path} exists, and is not overwritten: give another name, as in "
            "`batchinfer init other.yaml`"
        )

    def _name(self) -> None:
        """The job is named as its file, as far as it can be."""
        if not self._draft.says("name"):
            self._draft.say("name", name_of(Path(self._path).stem), COMMAND_LINE)

    def _ask_input(self, default: str | None) -> InputLook:
        def use() -> InputLook:
            job = self._draft.job
            with explained_places(job, None):
                look = look_at_input(job.input)
            _show(look.lines(self._width), self._width)
            return look

        return self._asker.ask("input.path", "--input", "input", default, use)

    def _ask_model(self, default: str | None) -> ModelLook:
        names_engine = self._draft.says("engine")

        def use() -> ModelLook:
            if not names_engine:
                self._name_engine()
            job = self._draft.job
            with explained_places(job, None):
                look = look_at_model(job)
            _show(look.lines(), self._width)
            return look

        model = self._asker.ask("model.path", "--model", "model", default, use)

        def fit() -> ModelLook:
            job = self._draft.job
            look = look_at_model(job, model.names)
            engine_kind(job.engine.name).check_fit(engine_spec(job, look.facts))
            return look

        names = ", ".join(["auto", *model.names])
        return self._asker.ask(
            "model.quantization", "--quantization", f"quantization ({names})", "auto", fit
        )

    def _name_engine(self) -> None:
        """That which the model needs, if it needs a certain one."""
        self._draft.take_back("engine.name")
        model = self._draft.value("model.path")
        if model and (engine := engine_for(model)) is not None:
            self._draft.say("engine.name", engine, "--model")

    def _ask_task(self) -> None:
        _say("What is computed? generate: an answer to each prompt; score: how likely a text is")
        self._asker.ask("task", "--task", "task", "generate", lambda: self._draft.job)

    def _ask_prompt(self, look: InputLook, model: ModelLook) -> None:
        draft = self._draft
        column = draft.value("prompt.column")
        if draft.says("prompt") and column is None:
            self._check_columns(look)
            return
        is_given = column is not None
        key = self._asker.ask(
            "prompt.column",
            "--prompt-column",
            "column with the text",
            look.likely_prompt(),
            lambda: look.prompt_key(draft.value("prompt.column")),
        )
        column = draft.value("prompt.column")
        draft.take_back("prompt.column")
        if key == "column" and model.can_chat and draft.job.task == "generate" and not is_given:
            place = f"{{{{ {written_column(column)} }}}}"
            _say(f"What is sent to the model? {place} stands for the row's text")
            self._asker.ask(
                "prompt.messages",
                "--message",
                "message",
                place,
                lambda: self._check_columns(look),
                lambda text: [{"role": "user", "content": text}],
            )
            return
        draft.say(f"prompt.{key}", column, "--prompt-column")
        self._check_columns(look)

    def _check_columns(self, look: InputLook) -> None:
        job = self._draft.job
        check_schema(job, task_of(job), None, look.shard, look.footer)

    def _ask_sampling(self, model: ModelLook) -> None:
        job = self._draft.job
        if job.task != "generate":
            return
        default = min(_MAX_TOKENS, max(1, model.facts.max_model_len // 2))
        self._asker.ask(
            "sampling.max_tokens",
            "--max-tokens",
            "most tokens of an answer",
            str(default),
            lambda: PromptLimit.of_generation(
                max_model_len=model.facts.max_model_len,
                max_tokens=self._draft.job.sampling.max_tokens,
            ),
            lambda text: int(text) if text.isdecimal() and text.isascii() else text,
        )

    def _ask_id(self, look: InputLook) -> None:
        prompt = self._draft.value("prompt.column")
        self._asker.ask(
            "input.id_column",
            "--id-column",
            "column with the row's id (- for none)",
            look.likely_id(prompt) or "-",
            lambda: self._check_columns(look),
            lambda text: None if text in ("", "-") else text,
        )

    def _ask_output(self) -> None:
        folder = Path("out", str(self._draft.value("name") or Path(self._path).stem))
        number = 2
        free = folder
        while free.exists():
            free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
        self._asker.ask(
            "output.path",
            "--output",
            "output",
            str(free),
            lambda: check_job(self._draft.job, None, self._path),
        )

    def _write(self, notes: Mapping[str, str], *, is_new: bool) -> None:
        defaults: dict[str, Any] = {"input.keep_columns": [], "model.quantization": "auto"}
        if self._draft.job.task == "generate":
            defaults["sampling.temperature"] = 0.0
        text = _HEADER.format(name=shlex.quote(self._path))
        text += written(self._draft.load(defaults).settings, notes)
        with os_errors("write", self._path):
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            try:
                with Path(self._path).open("x" if is_new else "w", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                raise ConfigError(
                    f"{self._path} was created in the meantime and is not overwritten: start again"
                ) from None
        generates = self._draft.job.task == "generate"
        click.secho(f"\nwritten: {self._path}", bold=True)
        for line in lines_of(after_init(self._path, generates=generates)):
            click.echo(f"  {line}")

    def _offer(self) -> None:
        """Somebody who sits there may see an answer at once."""
        generates = self._draft.job.task == "generate"
        if self._asker.takes_defaults or not generates or not sys.stdin.isatty():
            return
        click.echo()
        if self._asker.confirm("Load the model and try the first row now?", default=True):
            click.echo()
            try_job(JobSource(self._path, ()), TryOptions(None, None))


_HEADER = """\
# Written by `batchinfer init`; docs/job_file.md describes every key.
#   batchinfer validate {name}          checks it, without loading a model
#   batchinfer try {name}               shows one row's prompt and answer
#   batchinfer run {name} --limit 20    computes twenty rows; without --limit, all
"""


def _notes(look: InputLook, model: ModelLook) -> dict[str, str]:
    """By key, what is said of it in the file."""
    amount, *_ = look.lines(80)
    columns = ", ".join(look.schema.names)
    names = ", ".join(model.names)
    context, kind, *_ = model.lines()
    return {
        "input.path": f"Parquet: a glob, a folder, a file or a list of them. Here: {amount}.",
        "input.id_column": "Becomes the column `id` of the output; without it that is file:row.",
        "input.keep_columns": f"Copied to the output. There are: {columns}.",
        "prompt.messages": "Jinja2 templates, whose variables are columns of the input.",
        "prompt.column": "Its text is sent as it is.",
        "prompt.messages_column": "Lists of messages with role and content.",
        "prompt.token_ids_column": "Lists of token ids.",
        "model.path": f"A folder or a name on the hub. Here: {context}; {kind}.",
        "engine.name": "The engine that runs such a model.",
        "model.quantization": f"auto: as the checkpoint is. This machine runs it as {names}.",
        "sampling.max_tokens": "Of an answer; the prompt has what that leaves of the context.",
        "sampling.temperature": "0: always the likeliest token; for random ones set a seed, too.",
        "output.path": "A file of results for each input file. Run it again to continue.",
    }


def _say(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _show(lines: Iterator[str], width: int) -> None:
    for line in lines:
        short = textwrap.wrap(printable(line), width, subsequent_indent="  ", tabsize=1)
        for part in short if len(line) > width else [printable(line)]:
            click.secho(f"  {part}", dim=True)


def _show_found(paths: Sequence[str]) -> None:
    """Where there is more than the default."""
    if len(paths) > 1:
        more = ", …" if len(paths) > _MAX_FOUND else ""
        click.secho(
            f"  found here: {', '.join(map(printable, paths[:_MAX_FOUND]))}{more}", dim=True
        )
