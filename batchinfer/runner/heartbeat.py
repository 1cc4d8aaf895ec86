"""Signs of life: the lease's counter and the status file, every 10 s, from a thread of its own.

Runs from the taking of the lease to its giving back. Must not know: what the run does. A status
that cannot be written stops nothing; a lease that is lost or that somebody else took over ends the
run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from batchinfer.errors import BatchInferError, LeaseHeld, LeaseLost
from batchinfer.ledger import Lease

logger = logging.getLogger("batchinfer.runner")

BEAT_S = 10.0


class Heartbeat:
    def __init__(self, lease: Lease, write_status: Callable[[], None]) -> None:
        self._lease = lease
        self._write_status = write_status
        self._stopped = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def now(self) -> None:
        """Write the status soon, without waiting for it."""
        self._wanted.set()

    def stop(self) -> None:
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
                    self._tell()
        except Exception as error:  # the thread's edge: a lease without beats is soon another's
            self.error = error

    def _beat(self) -> None:
        try:
            self._lease.beat()
        except (LeaseHeld, LeaseLost):
            raise
        except BatchInferError as error:
            logger.warning("could not renew the lease: %s", error)

    def _tell(self) -> None:
        try:
            self._write_status()
        except LeaseLost:
            raise
        except BatchInferError as error:
            logger.warning("could not write the status: %s", error)
