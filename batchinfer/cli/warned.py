"""How commands other than `run` warn: what our loggers warn of is a line `warning  …`, each once.

Must not know: who warns. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from batchinfer.telemetry.logs import Warnings

#: Commands whose stdout is a report for people: warnings belong into it. Elsewhere stdout is data.
_REPORTS = ("validate", "plan", "doctor", "init")


class PrintedWarnings(Warnings):
    def __init__(self, command: str | None) -> None:
        super().__init__(self._print)
        self._is_err = command not in _REPORTS
        self._waiting: list[str] | None = None

    def _print(self, text: str) -> None:
        if self._waiting is None:
            click.echo(f"warning  {text}", err=self._is_err)
        else:
            self._waiting.append(text)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Print at the end: while an engine is there, the descriptors lead to its log."""
        self._waiting = []
        try:
            yield
        finally:
            waiting, self._waiting = self._waiting, None
            for text in waiting:
                self._print(text)

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        if more := self.texts()[len(self.records) :]:
            self._print(*more)


@contextmanager
def held_warnings() -> Iterator[None]:
    """See `PrintedWarnings.held`, for the command that is running."""
    printed = click.get_current_context().find_object(PrintedWarnings)
    assert printed is not None
    with printed.held():
        yield
