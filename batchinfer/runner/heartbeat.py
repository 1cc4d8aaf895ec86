"""Signs of life: the lease's counter and the status file, every 10 s, from a thread of its own.

Must not know: what the run does. A status that cannot be written stops nothing; a lease that
somebody else took over ends the run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from batchinfer.checkpoint import Lease
from batchinfer.errors import BatchInferError, LeaseHeld

logger = logging.getLogger("batchinfer.runner")

BEAT_S = 10.0


class Heartbeat:
    def __init__(self, lease: Lease, write_status: Callable[[], None]) -> None:
        self._lease = lease
        self._write_status = write_status
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        self._tell()
        while not self._stopped.wait(BEAT_S):
            try:
                self._lease.beat()
            except LeaseHeld as error:
                self.error = error
                return
            except BatchInferError as error:
                logger.warning("could not renew the lease: %s", error)
            self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(BatchInferError):
            self._write_status()
