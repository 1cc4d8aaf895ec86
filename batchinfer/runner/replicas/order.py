"""What each process of a run's replicas is told first. Must not know: where it is started."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from batchinfer.runner.replicas.messages import ReplicaOrder
from batchinfer.runner.session import Session
from batchinfer.telemetry.logs import LOGGER_NAME

#: Numbers for the parts of one process; those of merged parts are among them (`Ledger`).
_SEQUENCES = 1_000_000_000


def order_of(session: Session, cores: Sequence[int], number: int, num_seats: int) -> ReplicaOrder:
    """For the process of that number in this run, counted from 1. `num_seats`: of all replicas."""
    num_rows = session.num_rows_of(session.pending) * session.task.num_samples
    carried = session.carried
    return ReplicaOrder(
        job=session.job,
        options=session.options,
        model=session.model,
        digest=session.digest,
        window_rows=session.window_rows,
        run=session.run,
        carried=None if carried is None else carried.serialize().to_pybytes(),
        lease=session.lease.proof(),
        first_sequence=number * _SEQUENCES,
        num_rows=num_rows // num_seats,
        parent_pid=os.getpid(),
        cores=cores,
        log_level=logging.getLogger(LOGGER_NAME).getEffectiveLevel(),
    )
