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
        given = {argument.partition("=")[0] for argument in args}
        for earlier, today in self._RENAMED.items():
            if {earlier, today} <= given and self._has(today):
                raise click.UsageError(f"{earlier} is the earlier name of {today}: give one", ctx)
        return super().parse_args(ctx, [self._renamed(argument) for argument in args])

    def _renamed(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        today = self._RENAMED.get(name)
        return f"{today}{equals}{value}" if today and self._has(today) else argument

    def _has(self, option: str) -> bool:
        return any(option in parameter.opts for parameter in self.params)


class Group(click.Group):
    command_class = _Command
