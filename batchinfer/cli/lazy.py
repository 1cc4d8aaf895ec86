"""A command whose module is imported when it is called for, not to list it.

Must not know: any command.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import click


class Lazy(click.Command):
    """Stands for a command until somebody calls it or asks for its help."""

    def __init__(self, name: str, short_help: str, load: Callable[[], click.Command]) -> None:
        super().__init__(name, short_help=short_help)
        self._load = load

    @cached_property
    def command(self) -> click.Command:
        return self._load()

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        return self.command.make_context(*args, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return self.command.parse_args(ctx, args)
