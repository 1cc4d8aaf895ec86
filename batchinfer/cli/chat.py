"""`chat`: a conversation with a model, on a terminal or from a pipe.

Must not know: how an answer is made. Ctrl-C stops an answer, not the program; signals that end
other commands end this one.
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from batchinfer.cli.answers import load_engine, show_stream, summary, text_of
from batchinfer.cli.debug import show_traceback
from batchinfer.cli.places import explained_places
from batchinfer.cli.quiet_engine import Quiet, quiet_engine
from batchinfer.cli.source import JOB_OPTIONS, JobSource
from batchinfer.cli.tokens import Screen
from batchinfer.cli.warned import held_warnings
from batchinfer.config import Job, SamplingSettings
from batchinfer.config.prompt import PROMPT_KINDS
from batchinfer.engine.hardware import gib, gpus
from batchinfer.engine.host import own_memory_bytes
from batchinfer.errors import BatchInferError, ConfigError, EngineDied, printable
from batchinfer.runner.talk import Talk

_OTHERWISE: Mapping[str, Any] = {
    "input": {"path": "-"},
    "output": {"path": "-"},
    "prompt": {"messages_column": "-"},
}
#: Sections, and settings of `sampling`.
_OF_ROWS = ("input", "output", "packing", "checkpoint", "limits", "task", "score", "n", "per_row")
_HELP = """\
/set KEY=VALUE        a setting: temperature=0.8, max_tokens=64, model.dtype=float32, …
/set                  what is set so far
/quantization NAME    the model in another quantization: loads it again
/save-mode on|off     KV cache in the host's memory: loads it again
/system TEXT          what the system says first; without TEXT, nothing
/clear                forget what was said
/quit                 or Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


def source_of_target(target: str, sets: tuple[str, ...]) -> JobSource:
    """`target`: a job file, or a model."""
    if target.endswith((".yaml", ".yml", ".json")):
        return JobSource(target, sets)
    (model,) = (option for option in JOB_OPTIONS if option.key == "model.path")
    return JobSource(None, sets, ((model, target),))


def chat(source: JobSource) -> None:
    """Until the input ends. Raises ConfigError, TransientError, EngineDied."""
    job = _load(source)
    with held_warnings(), quiet_engine() as quiet:
        with explained_places(job, source.path):
            talk = Talk(job, lambda spec: load_engine(spec, quiet))
        try:
            talk.open()
            Repl(talk, source, quiet).run()
        finally:
            talk.close()


def _load(source: JobSource) -> Job:
    return source.load(_OTHERWISE).job


class Repl:
    """Reads a line, answers it."""

    def __init__(self, talk: Talk, source: JobSource, quiet: Quiet) -> None:
        self._talk = talk
        self._source = source
        self._quiet = quiet
        self._screen = Screen(quiet.stdio.out)
        self._is_answering = False
        self._is_stopped = False
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/help": lambda _: self._screen.line(_HELP),
            "/set": self._set,
            "/quantization": lambda name: self._change("model.quantization", name),
            "/save-mode": self._save_mode,
            "/system": self._system,
            "/clear": self._clear,
        }

    def run(self) -> None:
        facts = self._talk.engine.facts
        self._screen.line(
            f"{self._talk.spec.model.path}: {facts.dtype}, quantization "
            f"{self._talk.spec.model.quantization}, {facts.max_model_len:,} tokens of context, "
            f"{facts.name} {facts.version} on {facts.device}",
            bold=True,
        )
        self._screen.line(
            "Type what you would say to it. /help lists commands, Ctrl-D leaves", dim=True
        )
        self._quiet.watchdog.leave(signal.SIGINT, self._on_interrupt)
        while (line := self._read()) is not None:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name in ("/quit", "/exit"):
                    return
                self._obey(name, rest.strip())
            elif line:
                self._answer(line)

    def _on_interrupt(self) -> None:
        if not self._is_answering:
            raise KeyboardInterrupt
        self._is_stopped = True

    def _read(self) -> str | None:
        """What the user says; "" for nothing, None at the end."""
        lines: list[str] = []
        with self._quiet.stdio.given_back():
            try:
                while not lines or lines[-1].endswith("\\"):
                    lines.append(input("... " if lines else "> "))
            except KeyboardInterrupt:
                click.echo()
                return ""
            except EOFError:
                click.echo()
                return None
        return "\n".join(line.removesuffix("\\") for line in lines).strip()

    def _obey(self, name: str, rest: str) -> None:
        command = self._commands.get(name)
        if command is None:
            self._screen.line(f"there is no command {name}\n{_HELP}", fg="red")
            return
        try:
            command(rest)
        except EngineDied:
            raise
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception, hint: str = "") -> None:
        """What was asked for failed, and the conversation goes on: also where the fault is ours."""
        if isinstance(error, BatchInferError):
            show_traceback()
            self._screen.line(printable(f"{error}{hint}"), fg="red")
            return
        traceback.print_exc(file=self._quiet.stdio.err)
        text = "".join(traceback.format_exception_only(error)).strip()
        self._screen.line(printable(f"internal error: {text}"), fg="red")

    def _answer(self, text: str) -> None:
        talk, screen = self._talk, self._screen
        self._is_answering, self._is_stopped = True, False
        try:
            stream = talk.ask(text, lambda: self._is_stopped)
            completion = show_stream(stream, talk.prompter.encoder, screen)
        except EngineDied:
            raise
        except Exception as error:
            self._tell(error, " (/clear forgets what was said)")
            return
        finally:
            self._is_answering = False
        if completion is None:
            return
        talk.keep(text, completion, text_of(completion, talk.prompter.encoder))
        screen.line(
            f"{summary(completion, stream.pace, talk.engine)}; {talk.num_context_tokens:,} of "
            f"{talk.spec.model.max_model_len:,} tokens of context; {_memory()}",
            dim=True,
        )

    def _set(self, assignment: str) -> None:
        if not assignment:
            for text in self._source.sets:
                self._screen.line(text)
            return
        key, _, value = assignment.partition("=")
        key = key.strip()
        if _has_no_effect(key):
            raise ConfigError(f"/set {key}: it has no effect on a chat, which has no rows")
        self._change(f"sampling.{key}" if key in SamplingSettings.model_fields else key, value)

    def _change(self, key: str, value: str) -> None:
        """As --set does; what is refused is not set."""
        sets = (*self._source.sets, f"{key}={value.strip()}")
        source = replace(self._source, sets=sets, sets_name="/set")
        is_loaded = self._talk.change(_load(source))
        self._source = source
        if is_loaded:
            model = self._talk.spec.model
            self._screen.line(
                f"loaded: {model.dtype}, quantization {model.quantization}; {_memory()}", dim=True
            )

    def _save_mode(self, word: str) -> None:
        if word not in ("on", "off"):
            self._screen.line("/save-mode on, or /save-mode off", fg="red")
            return
        self._change("model.save_mode", json.dumps(word == "on"))

    def _system(self, text: str) -> None:
        self._talk.system = [{"role": "system", "content": text}] if text else []

    def _clear(self, _: str) -> None:
        self._talk.clear()


def _has_no_effect(key: str) -> bool:
    """Whether a setting is of rows: where they are, and how they are read and kept."""
    section, _, name = key.removeprefix("sampling.").partition(".")
    return section in _OF_ROWS or (section == "prompt" and name in PROMPT_KINDS)


def _memory() -> str:
    """What this process holds, and of GPUs what everybody does."""
    words = [f"{gib(own_memory_bytes())} of memory"]
    words += [f"{gpu.label} {gib(gpu.total_bytes - gpu.free_bytes)}" for gpu in gpus()]
    return ", ".join(words)
