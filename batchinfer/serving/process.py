"""The process of a server, seen from the one that watches it.

Must not know: why it is stopped. Its own group and session: what is sent to ours (Ctrl-C) is for us
to pass on.
"""

from __future__ import annotations

import http.client
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from batchinfer import errors
from batchinfer.errors import BatchInferError, EngineDied
from batchinfer.serving.address import Address
from batchinfer.serving.order import REPORT, ServerOrder

#: After the requests were given their time: for the engine to end.
_END_S = 5.0
_LOOK_S = 0.1
_ANSWER_S = 5.0


class ServerProcess:
    """Made by the main thread: the process ends with the thread that made it."""

    #: What Python runs as the process.
    module = "batchinfer.serving.child"

    def __init__(self, order: ServerOrder, address: Address) -> None:
        """Start it. Its streams are ours."""
        self._order = order
        self._address = address
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            pass_fds=[order.socket_fd],
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:  # `check` says why it ended
            stdin.write(pickle.dumps(order))

    def wait_until_ready(self) -> None:
        """Return once it answers. Raises what it ended with instead."""
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise self._ended_with()
            time.sleep(_LOOK_S)

    def watch(self) -> BatchInferError:
        """Wait for the end that nobody asked for: what it ended with."""
        self._process.wait()
        return self._ended_with()

    def drain(self) -> int | None:
        """Stop it, and wait until what is in flight has ended: the number of requests that were cut
        off. None: it did not end in time, and was killed.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._order.drain_s + _END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        num_cut = self._report().get("num_cut")
        return num_cut if isinstance(num_cut, int) else None

    def kill(self) -> None:
        """End it and its engine's processes immediately. Idempotent."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _is_healthy(self) -> bool:
        address = self._address
        connection = http.client.HTTPConnection(address.reached_at, address.port, timeout=_ANSWER_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _report(self) -> dict[str, object]:
        try:
            report: dict[str, object] = json.loads(Path(self._order.folder, REPORT).read_bytes())
        except FileNotFoundError:
            return {}
        return report

    def _ended_with(self) -> BatchInferError:
        code, report = self._process.returncode, self._report()
        kind = getattr(errors, str(report.get("error")), None)
        if isinstance(kind, type) and issubclass(kind, BatchInferError):
            return kind(str(report["message"]))
        if "message" in report:
            return BatchInferError(str(report["message"]))
        how = f"exit code {code}"
        if code < 0:
            how = f"ended by {signal.Signals(-code).name}"
        return EngineDied(f"the server's process is gone ({how}); its log has what it said last")
