"""`batchinfer run`: the process around one run. Terminal, log file, signals, the last line, the
exit code.

Must not know: how rows are computed. Invariant: the JSON line on stdout is the process's last
write, whatever libraries print or do at exit, so the process ends by `os._exit` right after it.
It is written once, also where the watchdog ends a process in which all else hangs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from batchinfer.cli.places import explained_places
from batchinfer.config import load_job
from batchinfer.errors import BatchInferError, ConfigError, LeaseHeld, Stopped, exit_code_of
from batchinfer.ledger import layout
from batchinfer.runner import (
    RunContext,
    RunOptions,
    Session,
    StopControl,
    outcome_of,
    release,
    run_job,
    write_status,
)
from batchinfer.storage import is_s3
from batchinfer.storage.local_errors import os_errors
from batchinfer.telemetry import Clock, Counters, Logs, Outcome, Progress, Stdio, choose_display

logger = logging.getLogger("batchinfer.cli")

_MAX_UPLOADED_LOG_BYTES = 4 << 20
_LAST_LINE_WAIT_S = 1.0


class Start:
    """One `batchinfer run`."""

    def __init__(
        self,
        job_path: str,
        sets: Sequence[str],
        options: RunOptions,
        *,
        quiet: bool,
        json_lines: bool,
        may_skip: bool = False,
    ) -> None:
        """`may_skip`: another run at work on this output is no failure."""
        self._job_path = job_path
        self._sets = sets
        self._options = options
        self._may_skip = may_skip
        self._quiet = quiet
        self._json_lines = json_lines
        self._stdio = Stdio()
        self._logs = Logs(
            self._stdio.err,
            json_lines=json_lines,
            level=logging.ERROR if quiet else logging.INFO,
        )
        clock = Clock()
        stop = StopControl()
        stop.on_abandon = self._abandon
        stop.end_process = self._end_at_once
        self._context = RunContext(
            clock=clock, stop=stop, counters=Counters(clock), on_run=self._open_log
        )
        self._output = ""  # the job's, once it is read
        self._log_path: Path | None = None  # of a log that has to be uploaded
        self._ending = threading.Lock()
        self._last_line = threading.Lock()  # taken for good by who writes it

    def run(self) -> NoReturn:
        """Run the job and end the process with its exit code."""
        context = self._context
        context.stop.watch()
        display = choose_display(
            self._stdio.err, os.environ, quiet=self._quiet, json_lines=self._json_lines
        )
        progress = Progress(display, context.counters.snapshot, logger, self._logs.terminal)
        try:
            job = load_job(self._job_path, self._sets).job
            self._output = _absolute(job.output.path)
            context.stop.set_max_seconds(job.limits.max_seconds)
            with progress, explained_places(job, self._job_path):
                outcome = run_job(job, self._options, context)
        except Stopped as error:
            outcome = outcome_of(context, "stopped", error.code, str(error))
        except BatchInferError as error:
            if self._may_skip and isinstance(error, LeaseHeld) and context.lease is None:
                logger.info("skipped: %s", error)
                outcome = outcome_of(context, "skipped", 0, str(error))
            else:
                outcome = outcome_of(context, "failed", exit_code_of(error), str(error))
        except BaseException as error:  # the process's edge: a bug
            logger.critical("this is a bug in batchinfer; please report it", exc_info=True)
            text = "".join(traceback.format_exception_only(error)).strip()
            outcome = outcome_of(context, "failed", 1, f"internal error: {text}")
        self._end(outcome)

    def _open_log(self, session: Session) -> None:
        """From here on everything that libraries print goes to the run's log file."""
        key = layout.log_key(session.run)
        if session.store.is_local:
            path = Path(session.store.url) / key
        else:
            path = self._log_path = _temporary_folder() / Path(key).name
        with os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stdio.redirect(path)
            self._logs.open_file(path, session.run)

    def _abandon(self, code: int, reason: str) -> None:
        """The watchdog ends the process: say so, give the lease back."""
        outcome = outcome_of(self._context, "stopped", code, reason)
        self._end(outcome)

    def _end_at_once(self, code: int, reason: str) -> NoReturn:
        """As above, without waiting for anything."""
        self._write_last_line(outcome_of(self._context, "stopped", code, reason))
        os._exit(code)

    def _end(self, outcome: Outcome) -> NoReturn:
        with self._ending:  # never two last lines
            try:
                self._report(outcome)
            finally:
                self._write_last_line(outcome)
                os._exit(outcome.exit_code)

    def _write_last_line(self, outcome: Outcome) -> None:
        if not self._last_line.acquire(timeout=_LAST_LINE_WAIT_S):
            return  # another thread is writing it
        outcome.output = outcome.output or self._output
        outcome.warnings = self._logs.warnings.texts()
        if not (self._quiet and outcome.exit_code == 0):
            self._stdio.write_result(json.dumps(outcome.as_dict()))

    def _report(self, outcome: Outcome) -> None:
        if outcome.exit_code:
            message = outcome.message
            for line in [message] if self._json_lines else message.splitlines():
                logger.error("%s", line)
        try:
            write_status(self._context, outcome.exit_code)
            release(self._context)
            self._upload_log()
        except (BatchInferError, OSError) as error:
            logger.warning("%s", error)
        with contextlib.suppress(OSError):  # the log's disk is full; the last line still counts
            self._logs.flush()
        self._stdio.err.flush()

    def _upload_log(self) -> None:
        session = self._context.session
        if self._log_path is None or session is None:
            return
        content = self._log_path.read_bytes()[-_MAX_UPLOADED_LOG_BYTES:]
        session.store.put(layout.log_key(session.run), content)
        self._log_path.unlink()
        self._log_path.parent.rmdir()


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="batchinfer-"))
    except OSError as error:
        raise ConfigError(
            f"cannot create a temporary folder: {error.strerror}. Set TMPDIR to a writable folder"
        ) from error


def _absolute(output: str) -> str:
    """An output location as the last line names it, also where the store was never opened."""
    return output if is_s3(output) else str(Path(output).expanduser().absolute())
