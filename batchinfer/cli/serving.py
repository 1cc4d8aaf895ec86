"""`batchinfer serve`: the process around one server. Log, signals, the first and the last line.

Must not know: how anything is served. Invariant: the JSON line on stdout is the last one, also of a
start that fails.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from batchinfer.cli.debug import is_debug, log_versions
from batchinfer.cli.next_steps import after_serve, say_next, while_serving
from batchinfer.cli.places import explained_places
from batchinfer.cli.source import JobSource
from batchinfer.engine.base import EngineSpec
from batchinfer.errors import BatchInferError, ConfigError, Stopped, exit_code_of
from batchinfer.model import has_chat_template
from batchinfer.runner.shortage import shortages
from batchinfer.serving import Address, ServerOrder, ServerProcess, bind, let_go, prepare
from batchinfer.signals import STOP_CODES, handled_signals, release_signals
from batchinfer.telemetry import Logs, ServerOutcome, Stdio

logger = logging.getLogger("batchinfer.cli")

#: Signals closer together are one, as `Watchdog` has it.
_TOGETHER_S = 0.25


class ServeProcess:
    """The process of one `batchinfer serve`."""

    def __init__(self, source: JobSource, host: str, port: int, api_key_env: str | None) -> None:
        self._source = source
        self._host, self._port = host, port
        self._api_key_env = api_key_env
        self._stdio = Stdio(follows=is_debug())
        self._logs = Logs(self._stdio.err, level=logging.DEBUG if is_debug() else logging.INFO)
        self._folder: Path | None = None
        self._url = ""
        self._chats = False  # there is a chat template
        self._signalled_s: float | None = None

    def run(self) -> NoReturn:
        """Serve until a signal, and end the process with its exit code."""
        for number in handled_signals():
            signal.signal(number, self._stop)
        try:
            release_signals()
            if is_debug():
                log_versions()
            with shortages(is_run=False):
                outcome = self._serve()
        except Stopped as error:
            outcome = ServerOutcome("stopped", error.code, str(error))
        except BatchInferError as error:
            logger.debug("where the error comes from", exc_info=True)
            outcome = ServerOutcome("failed", exit_code_of(error), str(error))
        except BaseException as error:  # the process's edge: a bug
            logger.critical("this is a bug in batchinfer; please report it", exc_info=True)
            text = "".join(traceback.format_exception_only(error)).strip()
            outcome = ServerOutcome("failed", 1, f"internal error: {text}")
        self._end(outcome)

    def _serve(self) -> ServerOutcome:
        """Raises Stopped for a signal before there was a server, and what else it ended with."""
        job = self._source.load().job
        api_key = api_key_of(self._api_key_env)
        with bind(self._host, self._port) as bound:
            address = Address.of(bound)
            with explained_places(job, self._source.path):
                service = prepare(job)
            self._chats = chats(service.spec)
            for note in service.spec.model.notes:
                logger.info("%s", note)
            for warning in service.spec.model.warnings:
                logger.warning("%s", warning)
            if service.ignored:
                logger.info("not for a server, ignored: %s", ", ".join(service.ignored))
            warn_of_openness(address, api_key)
            folder = self._folder = Path(tempfile.mkdtemp(prefix="batchinfer-"))
            log = folder / "server.log"
            self._stdio.redirect(log)
            logger.info("loading the model; the server's log is %s", log)
            order = ServerOrder(
                spec=service.spec,
                socket_fd=bound.fileno(),
                folder=str(folder),
                parent_pid=os.getpid(),
                api_key=api_key,
                logs_requests=is_debug(),
            )
            server = ServerProcess(order, address)
            return self._watch(server, job.name, bound)

    def _watch(self, server: ServerProcess, name: str, bound: socket.socket) -> ServerOutcome:
        try:
            url = Address.of(bound).url
            server.wait_until_ready()
            self._url = url
            let_go(bound)
            self._stdio.write_result(f"serving {name} at {url}/v1")
            self._say_how_to_ask(f"{url}/v1")
            raise server.watch()
        except Stopped as stop:
            if not self._url:
                raise
            logger.info("%s: waiting for the requests in flight", stop)
            num_cut = server.drain()
            message = f"{stop}"
            if num_cut is None:
                message += "; the server did not end in time and was killed"
            elif num_cut:
                message += f"; {num_cut} requests that did not end in time were cut off"
            return ServerOutcome("stopped", stop.code, message)
        finally:
            server.kill()

    def _say_how_to_ask(self, url: str) -> None:
        """To somebody at a terminal."""
        if not (self._stdio.out.isatty() and self._stdio.err.isatty()):
            return
        for line in while_serving(url, chats=self._chats, key_variable=self._api_key_env):
            self._stdio.err.write(f"{line}\n")
        self._stdio.err.flush()

    def _stop(self, number: int, _: FrameType | None) -> None:
        """The first signal stops the server, the second everything."""
        now_s = time.monotonic()
        if self._signalled_s is not None and (
            now_s < self._signalled_s + _TOGETHER_S or number == signal.SIGXCPU
        ):
            return
        is_first, self._signalled_s = self._signalled_s is None, now_s
        name = signal.Signals(number).name
        code = STOP_CODES[signal.Signals(number)]
        raise Stopped(f"received {name}" if is_first else f"received {name} as well: ended", code)

    def _end(self, outcome: ServerOutcome) -> NoReturn:
        for number in STOP_CODES:  # what is left is short
            signal.signal(number, signal.SIG_IGN)
        if outcome.exit_code:
            level = logging.INFO if outcome.status == "stopped" else logging.ERROR
            for line in outcome.message.splitlines():
                logger.log(level, "%s", line)
        if self._folder is not None and outcome.status == "failed":
            logger.info("the server's log is %s", self._folder / "server.log")
        elif self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._logs.flush()
        self._stdio.catch_up()
        self._stdio.err.flush()
        outcome.url, outcome.warnings = self._url, self._logs.warnings.texts()
        self._stdio.write_result(json.dumps(outcome.as_dict()))
        if outcome.status == "stopped":
            say_next(self._stdio.out, self._stdio.err, after_serve(self._source))
        os._exit(outcome.exit_code)


def api_key_of(variable: str | None) -> str | None:
    """Raises ConfigError for a variable without a key; no message has the key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(
            f"--api-key-env {variable}: that environment variable is not set, or empty. Put the "
            "key into it"
        )
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(
            f"--api-key-env {variable}: a key is printable ASCII without spaces around it, or no "
            "client can send it"
        )
    return key


def chats(spec: EngineSpec) -> bool:
    """Whether there is a chat template."""
    is_given = spec.job.prompt.chat_template is not None
    return is_given or has_chat_template(Path(spec.model.tokenizer_path))


def warn_of_openness(address: Address, api_key: str | None) -> None:
    if not address.is_local and api_key is None:
        logger.warning(
            "--host %s without --api-key-env: whoever reaches this machine can use the model",
            address.host,
        )
