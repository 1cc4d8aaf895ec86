"""The pending shards over several replicas: who is started, who died, and how all of it ends.

One thread owns all state. A replica that dies is started again, what it had goes to whoever asks
next, and the others do not notice. Must not know: how rows are computed, leases, what is done
already, which rows a replica has (`pending`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import wait

from batchinfer.engine.base import Placement
from batchinfer.errors import EngineDied, RepeatedDeath, TransientError
from batchinfer.runner.compute import Computed, Pulse
from batchinfer.runner.ending import Causes, bad_input, end, stopped
from batchinfer.runner.factory import with_weights
from batchinfer.runner.host import Host
from batchinfer.runner.replicas.messages import (
    Beat,
    Durable,
    Ended,
    FromReplica,
    HasRoom,
    NoMore,
    Ready,
    ReplicaOrder,
    Said,
    Stands,
    StopNow,
)
from batchinfer.runner.replicas.pending import PendingShards
from batchinfer.runner.replicas.process import ReplicaProcess
from batchinfer.runner.replicas.seat import Seat, error_of
from batchinfer.runner.replicas.standings import Standings
from batchinfer.runner.session import Session
from batchinfer.runner.status import Status
from batchinfer.telemetry.logs import LOGGER_NAME

logger = logging.getLogger("batchinfer.runner")

_WAIT_S = 0.2
#: From a stop on, before replicas that have not ended are killed: the process has 18 s.
_STOP_S = 15.0
#: After NoMore: the engine's end, and what it prints.
_END_S = 30.0
#: Deaths in a row without a durable row, after which a replica is not started again.
_MAX_FRUITLESS = 3
_PAUSES_S = (0.0, 1.0, 5.0)
#: Numbers for the parts of one process; those of merged parts are among them (`Ledger`).
_SEQUENCES = 1_000_000_000


def compute_on_replicas(
    session: Session,
    host: Host,
    status: Status,
    heartbeat: Pulse,
    placements: Sequence[Placement],
) -> Computed:
    """Work off the pending shards with a replica at each place.

    Raises Stopped, EngineDied, RepeatedDeath, InputError and what else ended it, see `Causes`.
    """
    return _Fleet(session, host, status, heartbeat, placements).run()


class _Fleet:
    def __init__(
        self,
        session: Session,
        host: Host,
        status: Status,
        heartbeat: Pulse,
        placements: Sequence[Placement],
    ) -> None:
        self._session = session
        self._host = host
        self._status = status
        self._heartbeat = heartbeat
        self._counters = host.counters
        self._seats = [Seat(number, place) for number, place in enumerate(placements)]
        self._pending = PendingShards(session, host, self._should_stop)
        self._dispatch = self._pending.dispatch
        self._num_processes = 0
        self._error: BaseException | None = None  # ends the run
        self._is_limited = False
        self._has_durable = False
        self._was_ready = False  # whether any replica was
        self._standings = Standings()

    def run(self) -> Computed:
        host, session = self._host, self._session
        host.tuning.begin()
        self._counters.set_max_tokens(session.task.max_tokens)
        with_weights(session.start.spec)  # made once, where replicas find it
        self._status.admitting(self, None)
        self._counters.set_phase("starting replicas")
        error: BaseException | None = None
        try:
            self._give_out()
        except BaseException as caught:  # replicas make durable what they have before it goes on
            error = caught
        self._wind_up(error)
        self._tell()
        end(self._causes(error))
        if what_kills := self._pending.what_kills():
            raise RepeatedDeath(what_kills)
        return Computed(self._pending.finished, self._is_limited)

    def _tell(self) -> None:
        if (verdict := self._status.verdict()) is not None:
            logger.info("%s", verdict)
        self._status.read_meters([gpu for seat in self._seats for gpu in seat.placement.gpus])
        if (spent := self._status.spent()) is not None:
            logger.info("%s", spent["text"])

    def in_flight(self) -> list[str]:
        """What the replicas' engines had a moment ago, as "shard:row". From any thread."""
        return [name for seat in self._seats for name in seat.in_flight]

    # The loop.

    def _give_out(self) -> None:
        while not (self._is_over() or self._should_stop()):
            self._start_due()
            self._listen()
            self._look_after()
            self._give()
            self._pending.collect()
        if self._should_stop():
            return
        for seat in self._running():
            assert seat.process is not None
            seat.process.send(NoMore())
        self._await_ends(_END_S)
        self._pending.await_folds()

    def _is_over(self) -> bool:
        return self._is_limited or self._dispatch.is_over

    def _should_stop(self) -> bool:
        return (
            self._host.stop.is_requested
            or self._error is not None
            or self._pending.error is not None
            or self._heartbeat.error is not None
        )

    def _running(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.process is not None]

    def _listen(self, wait_s: float = _WAIT_S) -> None:
        running = {seat.process.fileno(): seat for seat in self._seats if seat.process is not None}
        for descriptor in wait(list(running), wait_s):
            assert isinstance(descriptor, int)
            self._hear_all(running[descriptor])

    def _hear_all(self, seat: Seat) -> None:
        assert seat.process is not None
        for message in seat.process.messages():
            self._hear(seat, message)

    def _look_after(self) -> None:
        """Notice the replicas that ended."""
        for seat in self._running():
            assert seat.process is not None
            if seat.process.is_gone:
                self._hear_all(seat)
                self._bury(seat)

    # Starts and ends of replicas.

    def _start_due(self) -> None:
        now_s = time.monotonic()
        for seat in self._seats:
            if seat.process is None and not seat.is_given_up and now_s >= seat.due_s:
                self._start(seat)

    def _start(self, seat: Seat) -> None:
        session = self._session
        self._num_processes += 1
        carried = session.carried
        order = ReplicaOrder(
            job=session.job,
            options=session.options,
            model=session.model,
            digest=session.digest,
            window_rows=session.window_rows,
            run=session.run,
            carried=None if carried is None else carried.serialize().to_pybytes(),
            lease=session.lease.proof(),
            first_sequence=self._num_processes * _SEQUENCES,
            parent_pid=os.getpid(),
            cores=seat.placement.cores,
            log_level=logging.getLogger(LOGGER_NAME).getEffectiveLevel(),
        )
        self._counters.add_replica(seat.label, seat.num_starts)
        self._dispatch.begin(seat.number)
        seat.num_starts += 1
        seat.is_asking = seat.is_ready = seat.has_durable = False
        seat.in_flight, seat.last = (), None
        seat.process = ReplicaProcess(seat.placement, order)
        logger.info("replica started: %s, process %d", seat.label, seat.process.pid)

    def _bury(self, seat: Seat) -> None:
        """A replica has ended before it was told to."""
        assert seat.process is not None
        last, how = seat.last, seat.process.how_ended()
        seat.process.kill()  # what it started
        seat.process = None
        deadly = self._dispatch.lost(seat.number)
        if last is not None and not last.error:  # as it was told, or by --limit
            self._is_limited |= last.is_limited
            return
        error = error_of(last) if last is not None else EngineDied(f"its process is gone ({how})")
        # What a device cannot that another can is not the job's fault.
        is_start = not seat.is_ready and (isinstance(error, TransientError) or self._was_ready)
        if not (is_start or isinstance(error, EngineDied)):
            self._error = self._error or error
            return
        seat.num_fruitless = 0 if seat.has_durable else seat.num_fruitless + 1
        seat.why = str(error)
        seat.is_given_up = seat.num_fruitless >= _MAX_FRUITLESS
        seat.due_s = time.monotonic() + _PAUSES_S[min(seat.num_fruitless, len(_PAUSES_S) - 1)]
        what = "is not started again" if seat.is_given_up else "is started again"
        logger.warning(
            "replica %s %s: %s. It %s; what it had in hand goes to the next that asks",
            seat.label,
            "died" if seat.is_ready else "did not start",
            error,
            what,
        )
        for piece in deadly:
            logger.error(
                "left out: %s was in the engine at the deaths of replicas",
                self._pending.where(piece),
            )
        if all(other.is_given_up for other in self._seats):
            self._status.bury_engine()
            whys = dict.fromkeys(f"{other.label}: {other.why}" for other in self._seats)
            raise EngineDied(f"no replica can be kept running ({'; '.join(whys)})")

    def _await_ends(self, wait_s: float) -> None:
        """Until every replica has ended; those that have not by then are killed."""
        deadline_s = time.monotonic() + wait_s
        stop = self._host.stop
        while running := self._running():
            if stop.requested_s is not None:
                deadline_s = min(deadline_s, stop.requested_s + _STOP_S)
            if time.monotonic() >= deadline_s:
                break
            self._listen()
            for seat in running:
                assert seat.process is not None
                if seat.last is not None or seat.process.is_gone:
                    self._hear_all(seat)
                    if seat.last is not None and seat.last.error:
                        logger.info("replica %s: %s", seat.label, seat.last.message)
                    seat.process.kill()
                    seat.process = None
                    seat.in_flight = ()
        for seat in self._running():
            assert seat.process is not None
            logger.warning("replica %s did not end within %g s", seat.label, wait_s)
            seat.process.kill()
            seat.process = None

    def _wind_up(self, error: BaseException | None) -> None:
        """Whatever ended it: what replicas have finished becomes durable."""
        stop = self._host.stop
        cause = self._causes(error).first
        if cause is not None:
            self._counters.set_phase("writing finished rows")
            for seat in self._running():
                assert seat.process is not None
                seat.process.send(StopNow(stop.code or 1, stop.reason or str(cause)))
            self._await_ends(_STOP_S)
        self._pending.close()

    def _causes(self, error: BaseException | None) -> Causes:
        return Causes(
            stop=stopped(self._host.stop, None),
            writer=self._error or self._pending.error,
            lease=self._heartbeat.error,
            engine=error,
            input=bad_input(self._pending.input_errors.values()),
        )

    # What is pending.

    def _give(self) -> None:
        for seat in self._running():
            if seat.is_asking and (given := self._pending.give(seat.number)) is not None:
                assert seat.process is not None
                seat.is_asking = False
                seat.process.send(given)

    def _hear(self, seat: Seat, message: FromReplica) -> None:
        match message:
            case HasRoom():
                seat.is_asking = True
            case Said():
                self._log(seat, message)
            case Beat():
                self._counters.set_sums(seat.label, message.sums)
                self._dispatch.computed(seat.number, message.sums.rows_computed)
                if message.in_flight is not None:
                    seat.in_flight = message.in_flight
                if message.sums.num_steps and self._host.startup.total_s is None:
                    self._host.startup.end()
            case Stands():
                together = self._standings.hear(seat.label, seat.num_starts, message)
                self._status.replicas_stand(*together)
            case Ready():
                seat.is_ready = self._was_ready = True
                self._dispatch.ready(seat.number, message.max_in_flight)
                self._host.stop.begin_admission()
                self._counters.set_phase("computing")
            case Ended():
                seat.last = message
            case _:
                if isinstance(message, Durable):
                    self._note_durable(seat)
                self._pending.hear(seat.number, message)

    def _note_durable(self, seat: Seat) -> None:
        seat.has_durable = True
        if not self._has_durable:
            self._has_durable = True
            self._heartbeat.now()

    def _log(self, seat: Seat, said: Said) -> None:
        fields = said.fields
        if said.level < logging.WARNING:  # the same warning of two is one
            fields = {**fields, "replica": seat.label}
        logging.getLogger(said.logger).log(said.level, "%s", said.text, extra={"fields": fields})
