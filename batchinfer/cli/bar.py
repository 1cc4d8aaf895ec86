"""A live bar on a terminal; elsewhere a line for each step.

Must not know: what is done.
"""

from __future__ import annotations

import sys

import click


class Bar:
    """Shown while it is open."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._is_live = sys.stderr.isatty()
        self._progress = Progress(
            console=Console(stderr=True), transient=True, disable=not self._is_live
        )
        self._task = self._progress.add_task("reading the model", total=1.0)

    def say(self, what: str) -> None:
        self._progress.update(self._task, description=what, completed=0.0)
        if not self._is_live:
            click.echo(what, err=True)

    def note(self, what: str) -> None:
        """A line of its own, while what is said stays."""
        if self._is_live:
            self._progress.console.print(what, highlight=False)
        else:
            click.echo(what, err=True)

    def move(self, share: float) -> None:
        self._progress.update(self._task, completed=share)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
