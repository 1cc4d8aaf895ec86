"""The error tree. Each class carries its exit code, by which schedulers decide whether to retry.

    BatchInferError
    ├── ConfigError        2   the job file, an argument, the model or the machine cannot do this
    │   └── InputError     2   the input is missing, torn, changed, or has another schema
    ├── TooManyFailedRows  3   the output is complete, but too many rows are errors
    ├── RepeatedDeath      1   two starts in a row died without one new durable row
    ├── TransientError    75   try again later: store down, disk full, lease held, engine died
    │   ├── LeaseHeld     75
    │   ├── MemoryHeld    75
    │   ├── LeaseLost     75
    │   ├── AccessLost    75
    │   └── EngineDied    75
    ├── Stopped     128+n/75   asked to stop; everything finished is durable
    └── (RowError is data, not an exit: it becomes the row's error_type and error_message)

Anything else that reaches the CLI is a bug and exits 1. Must not know: the rest of the package.
"""

from __future__ import annotations

import re
from typing import ClassVar

from batchinfer.limits import Shortage

#: How a restart is asked for, in a message that the command and the Python door both give.
RESTART = "--restart (in Python restart=True)"
#: C0 but newline and tab, C1, separators of lines, and what turns the direction of text around.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class BatchInferError(Exception):
    """Base of every error raised on purpose. The message says what, where and what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(BatchInferError):
    """The job, an argument, the model folder or this machine cannot do what was asked."""

    exit_code = 2


class InputError(ConfigError):
    """The input is missing, unreadable, changed since the first run, or has another schema."""


class TooManyFailedRows(BatchInferError):
    """The output is complete, but more rows failed than `limits.max_failed_fraction` allows."""

    exit_code = 3


class RepeatedDeath(BatchInferError):
    """Two starts in a row died without one new durable row; names what was in flight."""

    exit_code = 1


class TransientError(BatchInferError):
    """Storage down past the retries, disk full: the same start may work later."""

    exit_code = 75


class LeaseHeld(TransientError):
    """Another live run works on this output."""


class MemoryHeld(TransientError):
    """Other processes hold memory of the device that the job needs."""


class LeaseLost(TransientError):
    """The output was deleted, moved or replaced under the run."""


class AccessLost(TransientError):
    """The store refuses credentials that it accepted when the run began; every write will fail."""


class EngineDied(TransientError):
    """The engine or one of its processes died; finished rows are kept."""


class Stopped(BatchInferError):
    """A signal or `limits.max_seconds` ended the run; finished rows are durable.

    `code` is that of the signal (batchinfer/signals.py) or 75 (max_seconds).
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RowError(Exception):
    """One row cannot be computed. Becomes output (`error_type`, `error_message`), never an exit.

    `kind` is one of ROW_ERROR_KINDS.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        assert kind in ROW_ERROR_KINDS, kind
        self.kind = kind
        self.message = message


#: Every value of `error_type` in an output file, with its meaning (docs and schemas use it).
ROW_ERROR_KINDS: dict[str, str] = {
    "missing_value": "a value that the prompt uses is null or NaN in this row",
    "invalid_prompt": "the value is not a prompt: wrong type, bad messages, token id out of range",
    "invalid_setting": "a column of sampling.per_row holds what that setting cannot be",
    "template_error": "the template failed on this row's values",
    "empty_prompt": "the prompt has no tokens",
    "prompt_too_long": "the prompt has more tokens than the model and the task leave room for",
    "engine_rejected": "the engine refused the request",
    "engine_error": "the engine ended the request without a result",
}


def printable(text: str) -> str:
    """Control characters of names and values as escapes, so that they neither act on a terminal nor
    make lines of their own; line ends stay.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def short_of(what: str, shortage: Shortage) -> ConfigError | TransientError:
    """The error for limits of this process that do not suffice for `what`, a noun."""
    kind = TransientError if shortage.may_pass else ConfigError
    return kind(f"{what} needs {shortage.text}")


def exit_code_of(error: BaseException) -> int:
    """The process exit code for `error`: the class's own, 1 for anything unforeseen."""
    if isinstance(error, Stopped):
        return error.code
    if isinstance(error, BatchInferError):
        return error.exit_code
    return 1
