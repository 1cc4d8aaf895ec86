"""How a run stands, for those outside it: its status file, and the outcome of its process.

The one source that heartbeat, caller and watchdog take it from, from any thread. Must not know:
how rows are computed. Invariant: the status file's last record is the one with the exit code; a
late beat cannot overwrite it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from batchinfer.engine.base import EngineFacts
from batchinfer.errors import LeaseLost
from batchinfer.ledger import layout, records
from batchinfer.runner.host import Host
from batchinfer.runner.record import restore
from batchinfer.runner.session import Session
from batchinfer.runner.spent import Spent
from batchinfer.runner.width.control import WidthReport, at_width, backlog_of, widths_told
from batchinfer.telemetry import UNKNOWN_TASK, Counters, Outcome, Tallied, status_record
from batchinfer.verdict import Setup, Verdict, judge


class InFlight(Protocol):
    def in_flight(self) -> Sequence[str]:
        """What the engine has at the moment, as "shard:row"."""


class Status:
    """Told what a run comes to; asked by everybody else."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._session: Session | None = None
        self._admitted: InFlight | None = None
        self._setup: Setup | None = None
        self._spent: Spent | None = None
        self._widths: dict[str, WidthReport] = {}  # by replica; "": of the one engine
        self._of_replicas: tuple[Setup, Tallied] | None = None
        self.capacity: int | None = None  # results in flight at once; None: no engine is up
        self._is_engine_dead = False
        self._is_final = False
        self._lock = threading.Lock()

    def begin(self, session: Session) -> None:
        """The output is ours, and the run has its number if there is something to compute."""
        self._session = session
        if session.run:
            self._spent = Spent(session.job.limits.price_per_hour)

    def engine_ready(self, facts: EngineFacts) -> None:
        """The log and every footer have them."""
        self.capacity = facts.max_num_seqs + backlog_of(facts.max_num_seqs)

    def admitting(self, admitted: InFlight, setup: Setup | None) -> None:
        """From now on the engine has rows."""
        self._admitted = admitted
        self._setup = setup

    def tuned(self, report: WidthReport, replica: str = "") -> None:
        """How many sequences run at once from now on, where that is to be found."""
        self._widths[replica] = report

    def replicas_stand(self, setup: Setup, tallied: Tallied) -> None:
        """What the engines of other processes did so far, together."""
        self._of_replicas = setup, tallied

    def verdict(self) -> Verdict | None:
        """On what the run did so far. None: no step yet."""
        if self._of_replicas is not None:
            return verdict_of(self._host.counters, *self._of_replicas)
        if self._setup is None:
            return None
        return verdict_of(self._host.counters, at_width(self._setup, self._widths.get("")))

    def read_meters(self, devices: Sequence[int] | None = None) -> None:
        """Of the devices that engines run on, which the driver answers for: by index, or those of
        the one engine.
        """
        if devices is None and self._setup is not None:
            devices = range(self._setup.num_devices)
        if self._spent is not None and devices:
            self._spent.read(devices)

    def spent(self) -> dict[str, Any] | None:
        """What the run cost so far, as far as that is known. None: nothing is."""
        session, counters = self._session, self._host.counters
        if self._spent is None or session is None:
            return None
        snapshot, of_tokens = counters.snapshot(), session.task.counts[0].replace("_", " ")
        return self._spent.as_dict(self._host.startup.now(), snapshot.result_tokens, of_tokens)

    def bury_engine(self) -> None:
        """It died, so what it had in flight is what killed it."""
        self._is_engine_dead = True

    def beat(self) -> None:
        """Write the file, and records that vanished. Raises LeaseLost, BatchInferError."""
        session = self._session
        if session is not None and session.run:
            session.lease.check()
            restore(session.store, session.written)
            self.read_meters()
        self.write()

    def write(self, exit_code: int | None = None) -> None:
        """Rewrite this run's status file; an exit code says that the run has ended."""
        session = self._session
        if session is None or not session.run:
            return
        try:
            session.lease.check()
        except LeaseLost:
            return  # it would be all that is at the place of an output that was deleted
        # In flight is what a death would be blamed on: not what an operator stopped.
        is_ended = exit_code is not None and not self._is_engine_dead
        is_ended |= self._host.stop.is_requested
        record = status_record(
            self._host.counters,
            run=session.run,
            slice_name=_name_of(session),
            holder=asdict(session.holder),
            in_flight=self._admitted.in_flight() if self._admitted and not is_ended else [],
            startup=self._host.startup.as_dict(),
            exit_code=exit_code,
        )
        record["verdict"] = verdict.as_dict() if (verdict := self.verdict()) else None
        record["tuning"] = widths_told(self._widths)
        record["spent"] = self.spent()
        with self._lock:  # a late beat must not overwrite the last word
            if not self._is_final:
                self._is_final = exit_code is not None
                session.store.put(layout.status_key(session.run), records.to_json(record))

    def outcome(self, status: str, exit_code: int, message: str = "") -> Outcome:
        """What the process did so far, under the name and code with which it ends."""
        snapshot = self._host.counters.snapshot()
        session = self._session
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
            result_tokens=snapshot.result_tokens,
            count_names=session.task.counts if session else UNKNOWN_TASK,
            generation_s=snapshot.generation_s,
            stalled_s=snapshot.stalled_s,
            steps=snapshot.num_steps,
            mean_num_running=snapshot.mean_num_running,
            share_of_steps_underfilled=snapshot.share_of_steps_underfilled,
            startup_s=self._host.startup.total_s,
            verdict=verdict.as_dict() if (verdict := self.verdict()) else None,
            tuning=widths_told(self._widths),
            spent=self.spent(),
        )


def _name_of(session: Session) -> str:
    """By which `status` knows the newest of its kind: of joined runs each is one."""
    name = session.options.lease_name
    return f"{name}-{session.run}" if session.options.join else name


def verdict_of(counters: Counters, setup: Setup, tallied: Tallied | None = None) -> Verdict | None:
    """On what an engine with this setup did so far; or on what several alike did (`tallied`), whose
    shares are means. None: no step yet.
    """
    tallied = tallied or counters.tally.so_far()
    return judge(
        tallied.steps,
        tallied.tokens,
        setup,
        tokens_per_s=counters.snapshot().mean_tokens_per_s,
        host_s=tallied.host_s,
        stalled_s=tallied.stalled_s,
    )
