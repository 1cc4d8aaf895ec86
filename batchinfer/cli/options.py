"""Options that several commands have, or that become one object.

Must not know: what a command does with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from batchinfer.errors import printable

_MAX_PRICE = 1e15
_F = TypeVar("_F", bound=Callable[..., Any])


class TextCommand(click.Command):
    """Takes only arguments that are text, as it writes them into records.

    And none that is empty: `--work "$UNSET"` would be the current directory.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for arg in args:
            try:
                arg.encode()
            except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
                raise click.UsageError(f"{printable(arg)} is not UTF-8 text", ctx) from None
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name or "")
            if "" in (given if isinstance(given, tuple) else (given,)):
                raise click.BadParameter("it is empty", ctx, parameter)
        return rest


def _slice(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    index, separator, count = value.partition("/")
    if not (separator and len(value) < 20 and index.isdigit() and count.isdigit()):
        raise click.BadParameter(f"{value[:40]!r} is not i/n with 1 <= i <= n, such as 1/4")
    if not 1 <= int(index) <= int(count):
        raise click.BadParameter(f"{value!r} is not i/n with 1 <= i <= n, such as 1/4")
    return int(index), int(count)


class _Price(click.FloatRange):
    """An amount of money that what is made of it cannot be infinite for either."""

    name = "price"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        price = float(super().convert(value, param, ctx))
        if not math.isfinite(price) or price > _MAX_PRICE:
            self.fail(f"{price:g} is not a price", param, ctx)
        return price


#: The type of an option that is a price.
PRICE = _Price(min=0)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `run` adds to the job, as the one argument `options`: a `RunOptions`."""

    @wraps(command)
    def collected(
        *,
        limit: int | None,
        slice_: tuple[int, int] | None,
        restart: bool,
        retry_failed: bool,
        join: bool,
        **others: Any,
    ) -> None:
        if restart and slice_ is not None:
            raise click.UsageError("--restart concerns the whole output: use it without --slice")
        from batchinfer.runner.options import RunOptions

        options = RunOptions(limit, slice_, restart, retry_failed, join)
        if clash := options.clash_with_join:
            option = clash[0].replace("_", "-")
            raise click.UsageError(f"--{option} concerns {clash[1]}: use it without --join")
        command(options=options, **others)

    for option in reversed(_RUN_OPTIONS):
        collected = option(collected)
    return collected


_RUN_OPTIONS: tuple[Callable[[_F], _F], ...] = (
    click.option(
        "--limit", type=click.IntRange(min=1), metavar="N", help="Compute N rows, then stop."
    ),
    click.option(
        "--slice",
        "slice_",
        callback=_slice,
        metavar="I/N",
        help="Process only every N-th input file, starting at the I-th: one process per GPU or "
        "task.",
    ),
    click.option(
        "--join",
        is_flag=True,
        help="Share the output with any number of runs that join too, on any machine that sees it.",
    ),
    click.option("--restart", is_flag=True, help="Delete the output's earlier results first."),
    click.option("--retry-failed", is_flag=True, help="Compute failed rows of the output again."),
)
