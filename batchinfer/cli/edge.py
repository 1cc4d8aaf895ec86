"""The edge of the command line: what ends a command becomes a text on stderr and an exit code.

Must not know: any command.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
import warnings
from typing import NoReturn

import click

from batchinfer.cli.app import cli
from batchinfer.cli.debug import OWN_LOGS, show_traceback
from batchinfer.cli.streams import READER_GONE_CODE, ReaderGone, check_streams
from batchinfer.errors import BatchInferError, exit_code_of, printable
from batchinfer.limits import limit_met
from batchinfer.signals import STOP_CODES


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    if any(action == "error" for action, *_ in warnings.filters):  # PYTHONWARNINGS=error
        warnings.simplefilter("ignore")  # other packages' warnings are not errors of a run
    check_streams()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        _end(error.exit_code, error.format_message())
    except click.Abort:
        _end(STOP_CODES[signal.SIGINT], "received SIGINT", status="stopped")
    except BatchInferError as error:
        show_traceback()
        _print_error(str(error))
        _end(exit_code_of(error), str(error))
    except ImportError as error:
        show_traceback()
        message = f"the installation is damaged or incomplete: {error}"
        if limit := limit_met():
            message = f"cannot import what is needed: {error}. {limit}"
        _print_error(message)
        _end(2, message)
    except ReaderGone:  # as in `| head`
        sys.exit(READER_GONE_CODE)
    except Exception as error:
        if (short := _as_shortage(error)) is not None:
            show_traceback()
            _print_error(str(short))
            _end(exit_code_of(short), str(short))
        traceback.print_exc()
        _end(1, f"internal error: {''.join(traceback.format_exception_only(error)).strip()}")


def _as_shortage(error: Exception) -> BatchInferError | None:
    from batchinfer.runner.shortage import shortages

    try:
        with shortages():
            raise error
    except BatchInferError as short:
        return short
    except Exception:
        return None


def _print_error(message: str) -> None:
    click.echo(f"error: {printable(message)}", err=True)


def _end(code: int, message: str, *, status: str = "failed") -> NoReturn:
    """Exit. What ends here, before its own process began, owes stdout its last line."""
    command = next((word for word in sys.argv[1:] if word in cli.commands), "")
    if command in OWN_LOGS:
        from batchinfer.telemetry import Outcome, ServerOutcome, Stdio

        outcome: Outcome | ServerOutcome = ServerOutcome(status, code, message)
        if command in ("run", "run-batch"):
            outcome = Outcome(status, code, output="", message=message)
        Stdio().write_result(json.dumps(outcome.as_dict()))
    sys.exit(code)
