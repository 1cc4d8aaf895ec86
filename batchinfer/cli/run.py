"""`batchinfer run`: the process around one run. Terminal, log file, signals, the last line, the
exit code.

Must not know: how rows are computed. Invariant: the JSON line is the last one on stdout, whatever
libraries print or do at exit, so the process ends by `os._exit` right after it. It is written once,
also where the watchdog ends a process in which all else hangs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from batchinfer.cli.debug import is_debug, log_versions
from batchinfer.cli.next_steps import after_run, say_next
from batchinfer.cli.places import explained_places
from batchinfer.cli.source import JobSource
from batchinfer.cli.watchdog import Watchdog
from batchinfer.config import Job
from batchinfer.errors import (
    AccessLost,
    BatchInferError,
    ConfigError,
    LeaseHeld,
    Stopped,
    TransientError,
    exit_code_of,
)
from batchinfer.ledger import layout
from batchinfer.runner import Host, Run, RunOptions, WholeProcess
from batchinfer.storage import Store, is_s3
from batchinfer.storage.local_errors import os_errors
from batchinfer.telemetry import Clock, Counters, Logs, Outcome, Progress, Stdio, choose_display

logger = logging.getLogger("batchinfer.cli")

_MAX_UPLOADED_LOG_BYTES = 4 << 20
_LAST_LINE_WAIT_S = 1.0


class RunProcess:
    """The process of one `batchinfer run`: all that it owns as a whole, around a `Run`."""

    def __init__(
        self,
        source: JobSource,
        options: RunOptions,
        *,
        quiet: bool,
        json_lines: bool,
        may_skip: bool = False,
    ) -> None:
        """`may_skip`: another run at work on this output is not a failure.

        With --debug, what would go to the log alone is shown as well, whatever `quiet` says.
        """
        is_shown = is_debug()
        self._source = source
        self._options = options
        self._may_skip = may_skip
        self._quiet = quiet = quiet and not is_shown
        self._json_lines = json_lines
        self._stdio = Stdio(follows=is_shown and not json_lines)
        self._logs = Logs(
            self._stdio.err,
            json_lines=json_lines,
            level=logging.DEBUG if is_shown else logging.ERROR if quiet else logging.INFO,
        )
        self._has_live_line = not is_shown  # it would be torn by what others print
        self._host = Host(Counters(Clock()), tuning=WholeProcess(), log=self._open_log)
        self._watchdog = Watchdog(self._host.stop, last_words=self._abandon, end=self._end_at_once)
        self._run: Run | None = None  # none before the job is read
        self._output = ""  # the job's, once it is read
        self._has_lost_access = False  # and the outcome says so
        self._upload: _Upload | None = None
        self._ending = threading.Lock()
        self._last_line = threading.Lock()  # taken for good by who writes it

    def run(self) -> NoReturn:
        """Run the job and end the process with its exit code."""
        self._watchdog.watch()
        display = choose_display(
            self._stdio.err,
            os.environ,
            quiet=self._quiet,
            json_lines=self._json_lines or not self._has_live_line,
        )
        if is_debug():
            log_versions()
        counters = self._host.counters
        progress = Progress(display, counters.snapshot, logger, self._logs.terminal)
        try:
            job = self._load()
            self._watchdog.set_max_seconds(job.limits.max_seconds)
            self._run = Run(job, self._options, self._host)
            with progress, explained_places(job, self._source.path):
                outcome = self._finish(self._computed(self._run))
        except Stopped as error:
            logger.debug("stopped", exc_info=True)
            outcome = self._outcome("stopped", error.code, str(error))
        except BatchInferError as error:
            logger.debug("where the error comes from", exc_info=True)
            has_lease = self._run is not None and self._run.has_lease
            if self._may_skip and isinstance(error, LeaseHeld) and not has_lease:
                logger.info("skipped: %s", error)
                outcome = self._outcome("skipped", 0, str(error))
            else:
                self._has_lost_access = isinstance(error, AccessLost)
                outcome = self._outcome("failed", exit_code_of(error), str(error))
        except BaseException as error:  # the process's edge: a bug
            logger.critical("this is a bug in batchinfer; please report it", exc_info=True)
            text = "".join(traceback.format_exception_only(error)).strip()
            outcome = self._outcome("failed", 1, f"internal error: {text}")
        self._end(outcome)

    def _load(self) -> Job:
        """The job to run."""
        job = self._source.load().job
        self._output = _absolute(job.output.path)
        return job

    def _computed(self, run: Run) -> Outcome:
        return run.run()

    def _finish(self, outcome: Outcome) -> Outcome:
        """What is done beside the run once it has ended well."""
        return outcome

    def _outcome(self, status: str, exit_code: int, message: str) -> Outcome:
        if self._run is None:
            return Outcome(status, exit_code, output="", message=message)
        return self._run.outcome(status, exit_code, message)

    def _open_log(self, store: Store, run: int) -> None:
        """From here on everything that libraries print goes to the run's log file."""
        key = layout.log_key(run)
        if store.is_local:
            path = Path(store.url) / key
        else:
            path = _temporary_folder() / Path(key).name
            self._upload = _Upload(store, key, path)
        with os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stdio.redirect(path)
            self._logs.open_file(path, run)

    def _abandon(self, code: int, reason: str) -> None:
        """The watchdog ends the process: say so, give the lease back."""
        self._end(self._outcome("stopped", code, reason))

    def _end_at_once(self, code: int, reason: str) -> NoReturn:
        """As above, without waiting for anything."""
        self._write_last_line(self._outcome("stopped", code, reason))
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
        if self._quiet and outcome.exit_code == 0:
            return
        error = self._stdio.write_result(json.dumps(outcome.as_dict()))
        if error is not None and not isinstance(error, BrokenPipeError):  # somebody waits for it
            self._stdio.err.write(
                f"error: cannot write the last line to stdout: {error.strerror}\n"
            )
            outcome.exit_code = outcome.exit_code or TransientError.exit_code
        elif not self._quiet:
            say_next(self._stdio.out, self._stdio.err, self._next_steps(outcome))

    def _next_steps(self, outcome: Outcome) -> dict[str, str]:
        return after_run(self._source, outcome, is_limited=self._options.limit is not None)

    def _report(self, outcome: Outcome) -> None:
        if outcome.exit_code:
            message = outcome.message
            is_wanted = outcome.status == "stopped" and outcome.exit_code != 1  # 1: a bug
            level = logging.INFO if is_wanted else logging.ERROR
            for line in [message] if self._json_lines else message.splitlines():
                logger.log(level, "%s", line)
        try:
            if self._run is not None:
                self._run.end(outcome.exit_code)
            if self._upload is not None:
                self._upload.send()
        except (BatchInferError, OSError) as error:
            if not (self._has_lost_access and isinstance(error, AccessLost)):
                logger.warning("%s", error)
        with contextlib.suppress(OSError):  # the log's disk is full; the last line still counts
            self._logs.flush()
        self._stdio.catch_up()
        self._stdio.err.flush()


@dataclass(frozen=True, slots=True)
class _Upload:
    """A log that is written here and belongs on a store."""

    store: Store
    key: str
    path: Path

    def send(self) -> None:
        self.store.put(self.key, self.path.read_bytes()[-_MAX_UPLOADED_LOG_BYTES:])
        self.path.unlink()
        self.path.parent.rmdir()


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
