"""Options that have a new name: commands take them by the earlier one too.

Must not know: what any command does.
"""

from __future__ import annotations

from typing import ClassVar

import click


class _Command(click.Command):
    """Also takes options by their earlier names, which `--help` does not show."""

    _RENAMED: ClassVar[dict[str, str]] = {"--shard": "--slice", "--calibrate": "--measure"}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._renamed(argument) for argument in args])

    def _renamed(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        today = self._RENAMED.get(name)
        is_here = today is not None and any(today in parameter.opts for parameter in self.params)
        return f"{today}{equals}{value}" if is_here else argument


class Group(click.Group):
    command_class = _Command
