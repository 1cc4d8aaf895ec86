"""`--debug` and `--env-file`, which every command has.

Debugging is a variable of the environment, so that the processes that a command starts do it too.
Must not know: what any command does. Nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

DEBUG_VARIABLE = "BATCHINFER_DEBUG"
#: Commands with a log of their own, whose last line on stdout is a JSON object.
OWN_LOGS = ("run", "run-batch", "serve")
_OFF = frozenset({"", "0", "false", "no", "off"})

logger = logging.getLogger("batchinfer.cli")


def is_debug() -> bool:
    """Whether this process shows what it otherwise keeps to itself."""
    return os.environ.get(DEBUG_VARIABLE, "").strip().lower() not in _OFF


def add_common_options(command: click.Command) -> None:
    command.params += [_ENV_FILE, _DEBUG]


def show_traceback() -> None:
    """Of the error that is being handled, with --debug."""
    if is_debug():
        traceback.print_exc()


def log_versions() -> None:
    """What this is and what it runs on, and what was asked for."""
    from batchinfer.cli.versions import engine_versions, package_versions, program_version

    logger.debug("%s", program_version())
    logger.debug("packages: %s", package_versions())
    logger.debug("packages of engines: %s", engine_versions())
    logger.debug("started in %s as: %s", os.getcwd(), " ".join(sys.argv))  # noqa: PTH109


@contextmanager
def _logged_to_stderr() -> Iterator[None]:
    """For commands without a log of their own: what loggers say is on stderr."""
    from batchinfer.telemetry.logs import HumanFormatter, debug_loggers

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HumanFormatter(is_file=True))
    with debug_loggers(handler):
        log_versions()
        yield


def _read_env_file(context: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is not None and not context.resilient_parsing:
        from batchinfer.cli.env_file import read_env_file

        for name, value in read_env_file(path).items():
            os.environ.setdefault(name, value)


def _begin(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if context.resilient_parsing:
        return
    if is_asked:
        os.environ[DEBUG_VARIABLE] = "1"
    has_own = isinstance(context.command, click.Group) or context.info_name in OWN_LOGS
    if is_debug() and not has_own:
        context.with_resource(_logged_to_stderr())


_ENV_FILE = click.Option(
    ["--env-file"],
    metavar="FILE",
    expose_value=False,
    is_eager=True,
    callback=_read_env_file,
    help="Set environment variables from NAME=VALUE lines, except those that are set.",
)
_DEBUG = click.Option(
    ["--debug"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_begin,
    help="Show the engine's log, tracebacks, the first prompts as they are sent, and versions.",
)
