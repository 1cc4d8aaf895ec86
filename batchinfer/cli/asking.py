"""Questions on a terminal: each with a default, asked again until the answer can be used.

Must not know: what is asked.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import click

from batchinfer.cli.draft import JobDraft
from batchinfer.errors import BatchInferError, ConfigError, printable

_T = TypeVar("_T")


class Asker:
    """Puts answers into a draft. `takes_defaults`: nobody is asked (--yes)."""

    def __init__(self, draft: JobDraft, *, takes_defaults: bool) -> None:
        self._draft = draft
        self.takes_defaults = takes_defaults

    def ask(
        self,
        key: str,
        option: str,
        question: str,
        default: str | None,
        use: Callable[[], _T],
        make: Callable[[str], Any] = lambda answer: answer,
    ) -> _T:
        """What `use` makes of the draft once it says `key`: by `option`, --set, or as answered.

        `make`: answer -> value of the setting, None for none. Raises what `use` raises if nobody
        is asked, and ConfigError if then there is no default.
        """
        if self._draft.says(key):
            self._show(question, self._draft.value(key))
            return use()
        if self.takes_defaults:
            if default is None:
                raise ConfigError(f"--yes: nothing found here determines {key}: give {option}")
            self._show(question, default)
            self._say(key, make(default), option)
            return use()
        while True:
            self._say(key, make(self._answer(question, default)), option)
            try:
                return use()
            except BatchInferError as error:
                self._draft.take_back(key)
                click.secho(textwrap.indent(printable(str(error)), "  "), fg="red")

    def confirm(self, question: str, *, default: bool) -> bool:
        """Whether it is to be; the default where nobody is asked."""
        if self.takes_defaults:
            return default
        with _answered(question):
            return click.confirm(question, default=default)

    def _show(self, question: str, answer: Any) -> None:
        """As if it had been asked. None: --set says it."""
        if answer is not None:
            text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
            click.echo(f"{question}: {printable(text)}")

    def _say(self, key: str, value: Any, option: str) -> None:
        if value is None:
            self._draft.take_back(key)
        else:
            self._draft.say(key, value, option)

    def _answer(self, question: str, default: str | None) -> str:
        with _answered(question):
            answer = click.prompt(question, default=default, show_default=bool(default))
        return str(answer).strip()


class _answered:
    """Where stdin ends before the answer, nobody pressed Ctrl-C: say what can be done."""

    def __init__(self, question: str) -> None:
        self._question = question

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is click.Abort and not sys.stdin.isatty():
            raise ConfigError(
                f"stdin ended before this was answered: {self._question}. --yes takes the "
                "defaults, and `batchinfer init --help` lists the options that answer"
            )
