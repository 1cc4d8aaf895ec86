"""The pending shards over several replicas: who is started, who died, and how all of it ends.

One thread owns all state. A replica that dies is started again, what it had goes to whoever asks
next, and the others do not notice. Must not know: how rows are computed, leases, what is done
already, which rows a replica has (`pending`).
"""

from __future__ import annotations

import logging
import time
from multiprocessing.connection import wait

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
    Said,
    Stands,
    StopNow,
    Tuned,
)
from batchinfer.runner.replicas.order import order_of
from batchinfer.runner.replicas.pending import PendingOf, PendingShards
from batchinfer.runner.replicas.places import Places, WaitForPlace
from batchinfer.runner.replicas.seat import Seat, error_of, say_again
from batchinfer.runner.replicas.standings import Standings
from batchinfer.runner.session import Session
from batchinfer.runner.status import Status

logger = logging.getLogger("batchinfer.runner")

_WAIT_S = 0.2
#: Replicas speak four times a second. While one starts, an import or a compiler may hold all of its
#: threads for minutes.
SILENT_S, _SILENT_START_S = 60.0, 600.0
#: From a stop on, before replicas that have not ended are killed: the process has 18 s.
_STOP_S = 15.0
#: After NoMore: the engine's end, and what it prints.
_END_S = 30.0


def compute_on_replicas(
    session: Session,
    host: Host,
    status: Status,
    heartbeat: Pulse,
    places: Places,
    pending_of: PendingOf = PendingShards,
) -> Computed:
    """Work off what is pending (`pending_of`) with a replica at each place, and end those.

    Raises Stopped, EngineDied, RepeatedDeath, InputError and what else ended it, see `Causes`.
    """
    return _Fleet(session, host, status, heartbeat, places).run(pending_of)


class _Fleet:
    def __init__(
        self, session: Session, host: Host, status: Status, heartbeat: Pulse, places: Places
    ) -> None:
        self._session = session
        self._host = host
        self._status = status
        self._heartbeat = heartbeat
        self._counters = host.counters
        self._places = places
        self._seats: list[Seat] = []
        self._num_processes = 0
        self._looked_s = time.monotonic()
        self._wait = WaitForPlace(places)
        self._error: BaseException | None = None  # ends the run
        self._is_limited = False
        self._has_durable = False
        self._was_ready = False  # whether any replica was
        self._standings = Standings()

    def run(self, pending_of: PendingOf) -> Computed:
        self._pending = pending_of(self._session, self._host, self._should_stop)
        self._dispatch = self._pending.dispatch
        try:
            return self._run()
        finally:
            self._places.close()

    def _run(self) -> Computed:
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

    def _give_out(self) -> None:
        while not (self._is_over() or self._should_stop()):
            self._add_seats()
            self._start_due()
            self._listen()
            self._look_after()
            self._give()
            self._pending.collect()
        if self._should_stop():
            return
        self._tell_all(NoMore())
        self._await_ends(_END_S)
        self._pending.await_folds()

    def _is_over(self) -> bool:
        return self._is_limited or self._pending.is_over

    def _should_stop(self) -> bool:
        return (
            self._host.stop.is_requested
            or self._error is not None
            or self._pending.error is not None
            or self._heartbeat.error is not None
        )

    def _running(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.replica is not None]

    def _listen(self, wait_s: float = _WAIT_S) -> None:
        running = {seat.replica.fileno(): seat for seat in self._seats if seat.replica is not None}
        for descriptor in wait(list(running), wait_s):
            assert isinstance(descriptor, int)
            self._hear_all(running[descriptor])

    def _hear_all(self, seat: Seat) -> None:
        assert seat.replica is not None
        self._note_place(seat)
        for message in seat.replica.messages():
            seat.silent_s = 0.0
            self._hear(seat, message)

    def _tell_all(self, message: NoMore | StopNow) -> None:
        """Those that wait for a place end at once."""
        for seat in self._running():
            assert seat.replica is not None
            self._note_place(seat)
            if seat.is_placed:
                seat.replica.send(message)
            else:
                seat.replica.kill()
                seat.replica = None

    def _look_after(self) -> None:
        """Notice the replicas that ended, and those that are silent: their process or machine is
        frozen or cut off. Time counts only while this process runs: it may be paused itself.
        """
        now_s = time.monotonic()
        passed_s, self._looked_s = min(1.0, now_s - self._looked_s), now_s
        for seat in self._running():
            assert seat.replica is not None
            self._note_place(seat)
            if seat.replica.is_gone:
                self._hear_all(seat)
                self._bury(seat, seat.replica.how_ended())
            elif seat.is_placed:
                seat.silent_s += passed_s
                most_s = SILENT_S if seat.is_ready else _SILENT_START_S
                if seat.silent_s > most_s:
                    self._bury(seat, f"nothing was heard of it for {most_s:g} s")
        if self._wait.passed(passed_s, is_over=any(seat.is_placed for seat in self._seats)):
            self._counters.set_phase("waiting for a place in the cluster")

    # Starts and ends of replicas.

    def _add_seats(self) -> None:
        appeared = enumerate(self._places.appeared(), len(self._seats))
        self._seats += [Seat(number, place) for number, place in appeared]

    def _start_due(self) -> None:
        now_s = time.monotonic()
        for seat in self._seats:
            if seat.replica is None and not seat.is_given_up and now_s >= seat.due_s:
                self._start(seat)

    def _start(self, seat: Seat) -> None:
        self._num_processes += 1
        order = order_of(self._session, seat.placement.cores, self._num_processes, len(self._seats))
        seat.is_placed = seat.is_asking = seat.is_ready = seat.has_durable = False
        seat.in_flight, seat.last = (), None
        seat.replica = self._places.start(seat.placement, order)
        self._note_place(seat)

    def _note_place(self, seat: Seat) -> None:
        """Whether it has one by now: only then it has a share of the work."""
        assert seat.replica is not None
        if seat.is_placed or (where := seat.replica.where) is None:
            return
        seat.is_placed, seat.silent_s = True, 0.0
        self._counters.add_replica(seat.label, seat.num_starts)
        self._dispatch.begin(seat.number)
        seat.num_starts += 1
        logger.info("replica started: %s, %s", seat.label, where)

    def _bury(self, seat: Seat, how: str) -> None:
        """A replica has ended before it was told to, or is taken for dead."""
        assert seat.replica is not None
        last = seat.last
        seat.replica.kill()  # what it started
        seat.replica, seat.is_placed = None, False
        deadly = self._dispatch.lost(seat.number)
        if last is not None and not last.error:  # as it was told, or by --limit
            self._is_limited |= last.is_limited
            return
        error = error_of(last) if last is not None else EngineDied(how)
        # What a device cannot that another can is not the job's fault.
        is_start = not seat.is_ready and (isinstance(error, TransientError) or self._was_ready)
        if not (is_start or isinstance(error, EngineDied)):
            self._error = self._error or error
            return
        seat.died(str(error))
        what = "is not started again" if seat.is_given_up else "is started again"
        logger.warning(
            "replica %s %s: %s. It %s; what it had in hand goes to the next that asks",
            seat.label,
            "died" if seat.is_ready else "did not start",
            error,
            what,
        )
        for piece in deadly:
            self._pending.leave_out(piece)
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
                assert seat.replica is not None
                if seat.last is not None or seat.replica.is_gone:
                    self._hear_all(seat)
                    if seat.last is not None and seat.last.error:
                        logger.info("replica %s: %s", seat.label, seat.last.message)
                    seat.replica.kill()
                    seat.replica = None
                    seat.in_flight = ()
        for seat in self._running():
            assert seat.replica is not None
            logger.warning("replica %s did not end within %g s", seat.label, wait_s)
            seat.replica.kill()
            seat.replica = None

    def _wind_up(self, error: BaseException | None) -> None:
        """Whatever ended it: what replicas have finished becomes durable."""
        stop = self._host.stop
        cause = self._causes(error).first
        if cause is not None:
            self._counters.set_phase("writing finished rows")
            self._tell_all(StopNow(stop.code or 1, stop.reason or str(cause)))
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

    def _give(self) -> None:
        for seat in self._running():
            if seat.is_asking and (given := self._pending.give(seat.number)) is not None:
                assert seat.replica is not None
                seat.is_asking = False
                seat.replica.send(given)

    def _hear(self, seat: Seat, message: FromReplica) -> None:
        match message:
            case HasRoom():
                seat.is_asking = True
            case Said():
                say_again(message, seat.label)
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
            case Tuned():
                self._status.tuned(message.report, seat.label)
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
