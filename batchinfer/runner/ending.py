"""Which of several errors a run ends with, and what it says. Must not know: how they came about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from batchinfer.errors import EngineDied, InputError, Stopped
from batchinfer.runner.stop import Stop


class Causes(NamedTuple):
    """What may end a run early, the first of them first: what is below is often its result.

    A stop outranks an engine that died of the same signal. A thread's error outranks that of the
    main thread, which may only have noticed that nothing comes or goes any more. Shards that could
    not be read end a run last: all others are finished.
    """

    stop: BaseException | None = None
    writer: BaseException | None = None
    reader: BaseException | None = None
    lease: BaseException | None = None
    engine: BaseException | None = None
    input: BaseException | None = None

    @property
    def first(self) -> BaseException | None:
        return next((cause for cause in self if cause is not None), None)


def stopped(stop: Stop, writer_error: BaseException | None) -> Stopped | None:
    if not stop.is_requested:
        return None
    what = "finished rows are durable" if writer_error is None else f"{writer_error}"
    return Stopped(f"{stop.reason}: {what}; the next start continues", stop.code)


def bad_input(problems: Iterable[InputError]) -> InputError | None:
    lines = [str(problem) for problem in problems]
    return InputError("\n".join(lines[:20])) if lines else None


def end(causes: Causes) -> None:
    """Raise the first cause, if there is one."""
    cause = causes.first
    if isinstance(cause, EngineDied):
        raise EngineDied(f"{cause}. Finished rows are durable: start again") from cause
    if cause is not None:
        raise cause
