"""The process of a replica on this machine, seen from the one that gives out the work.

In a session of its own: what is sent to our group (Ctrl-C, a scheduler's SIGTERM) is for us to pass
on. Must not know: what a replica is given.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from batchinfer.engine.base import Placement
from batchinfer.runner.replicas.messages import FromReplica, ReplicaOrder, ToReplica

_END_S = 5.0


class ReplicaProcess:
    """Made by the thread that outlives it: the process ends with the thread that made it."""

    #: What Python runs as the process.
    module = "batchinfer.runner.replicas.child"

    def __init__(
        self, placement: Placement, order: ReplicaOrder, module: str | None = None
    ) -> None:
        """Start it. Its streams are our stderr."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module or self.module, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | dict(placement.environ),
                    start_new_session=True,
                )
        except BaseException:  # no process to be had
            ours.close()
            raise
        self._line: Connection[Any, Any] = Connection(ours.detach())
        self.send(order)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def where(self) -> str:
        return f"process {self.pid}"

    def fileno(self) -> int:
        """Readable when it has said something, or has ended."""
        return self._line.fileno()

    def send(self, message: ReplicaOrder | ToReplica) -> None:
        with suppress(OSError):  # it is gone, as `is_gone` will show
            self._line.send(message)

    def messages(self) -> Iterator[FromReplica]:
        """What it has said by now. Without waiting, but for the rest of a message."""
        with suppress(EOFError, OSError):
            while self._line.poll():
                yield self._line.recv()

    @property
    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def how_ended(self) -> str:
        """For people; after its end."""
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return f"its process is gone ({how})"

    def kill(self) -> None:
        """End it, and what it started, immediately. Idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._line.close()
