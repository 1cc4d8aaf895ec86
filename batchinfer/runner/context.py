"""What one start shares between its threads and its caller, and how it ended.

Must not know: how rows are computed. Invariant: the status file's last record is the one with the
exit code; a late beat cannot overwrite it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from batchinfer.errors import BatchInferError, LeaseLost
from batchinfer.ledger import Lease, layout, records
from batchinfer.runner.heartbeat import Heartbeat
from batchinfer.runner.loop import Loop
from batchinfer.runner.session import Session
from batchinfer.runner.stop import StopControl
from batchinfer.tasks import task_of
from batchinfer.telemetry import Clock, Counters, Outcome, StartUp, status_record

logger = logging.getLogger("batchinfer.runner")


@dataclass(slots=True)
class RunContext:
    """What a start shares with its caller and its watchdog."""

    clock: Clock
    stop: StopControl
    counters: Counters
    startup: StartUp = field(default_factory=StartUp)
    on_run: Callable[[Session], None] = lambda session: None  # a run number was given out
    heartbeat: Heartbeat | None = None
    lease: Lease | None = None
    session: Session | None = None
    loop: Loop | None = None
    is_engine_dead: bool = False
    is_cautious: bool = False  # the run before died without a new durable row
    status_lock: threading.Lock = field(default_factory=threading.Lock)
    is_status_final: bool = False


def release(context: RunContext) -> None:
    """Give the lease back.

    Never raises: a lease that stays is taken over when its holder is gone.
    """
    if context.heartbeat is not None:
        context.heartbeat.stop()
    if context.lease is not None:
        try:
            context.lease.release()
        except BatchInferError as error:
            logger.warning("could not give the lease back: %s", error)


def outcome_of(context: RunContext, status: str, exit_code: int, message: str = "") -> Outcome:
    snapshot = context.counters.snapshot()
    session = context.session
    return Outcome(
        status=status,
        exit_code=exit_code,
        output=session.store.url if session else "",
        message=message,
        run=session.run or None if session else None,
        rows_durable=snapshot.rows_durable,
        rows_failed=snapshot.rows_failed,
        counts=snapshot.counts,
        rows_computed=snapshot.rows_computed,
        prompt_tokens=snapshot.prompt_tokens,
        result_tokens=snapshot.completion_tokens,
        token_name=task_of(session.job).counts[0] if session else "completion_tokens",
        generation_s=snapshot.generation_s,
        stalled_s=snapshot.stalled_s,
        steps=snapshot.num_steps,
        mean_num_running=snapshot.mean_num_running,
        share_of_steps_underfilled=snapshot.share_of_steps_underfilled,
        startup_s=context.startup.total_s,
    )


def write_status(context: RunContext, exit_code: int | None = None) -> None:
    """Rewrite this run's status file; an exit code says that the run has ended."""
    session = context.session
    if session is None or not session.run:
        return
    try:
        session.lease.check()
    except LeaseLost:
        return  # it would be all that is at the place of an output that was deleted
    # In flight is what a death would be blamed on: not what an operator stopped.
    is_ended = exit_code is not None and not context.is_engine_dead
    is_ended |= context.stop.is_requested
    record = status_record(
        context.counters.snapshot(),
        run=session.run,
        slice_name=session.options.lease_name,
        holder=asdict(session.holder),
        started_at=session.holder.since,
        clock=context.clock,
        in_flight=context.loop.in_flight() if context.loop and not is_ended else [],
        startup=context.startup.as_dict(),
        exit_code=exit_code,
    )
    with context.status_lock:  # a late beat must not overwrite the last word
        if not context.is_status_final:
            context.is_status_final = exit_code is not None
            session.store.put(layout.status_key(session.run), records.to_json(record))
