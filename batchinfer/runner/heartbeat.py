"""Signs of life: the lease's counter and the status file, every 10 s, from a thread of its own.

Runs from the taking of the lease to its giving back, and writes immediately when a stop is asked
for. Must not know: what the run does. A status that cannot be written stops nothing; a lease that
is lost or that somebody else took over ends the run.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from batchinfer.errors import AccessLost, BatchInferError, LeaseHeld, LeaseLost
from batchinfer.ledger import Lease
from batchinfer.runner.stop import Stop

logger = logging.getLogger("batchinfer.runner")

BEAT_S = 10.0


class StatusSource(Protocol):
    def beat(self) -> None:
        """Show on storage how the run stands. Raises LeaseLost, BatchInferError."""


class Heartbeat:
    def __init__(self, lease: Lease, source: StatusSource, stop: Stop) -> None:
        self._lease = lease
        self._source = source
        self._stop_request = stop
        self._stopped = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._error: BaseException | None = None
        self._has_lost_access = False

    @property
    def error(self) -> BaseException | None:
        """What ends the run: the lease is not ours any more."""
        return self._error

    def start(self) -> None:
        self._stop_request.wake(self._wanted)
        self._thread.start()

    def now(self) -> None:
        """Write the status soon, without waiting for it."""
        self._wanted.set()

    def stop(self) -> None:
        self._stop_request.forget(self._wanted)
        self._stopped.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                if not self._wanted.wait(BEAT_S):
                    self._beat()
                self._wanted.clear()
                if not self._stopped.is_set():
                    self._show()
        except Exception as error:  # the thread's edge: a lease without beats is soon another's
            self._error = error

    def _beat(self) -> None:
        try:
            self._lease.beat()
        except (LeaseHeld, LeaseLost):
            raise
        except BatchInferError as error:
            self._warn("could not renew the lease", error)

    def _show(self) -> None:
        try:
            self._source.beat()
        except LeaseLost:
            raise
        except BatchInferError as error:
            self._warn("could not write the status", error)

    def _warn(self, what: str, error: BatchInferError) -> None:
        """Lost access is reported in full when it ends the run, and here once, briefly."""
        if not isinstance(error, AccessLost):
            logger.warning("%s: %s", what, error)
        elif not self._has_lost_access:
            self._has_lost_access = True
            logger.warning("%s: the store now refuses the credentials", what)
