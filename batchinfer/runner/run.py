"""One start of a job, from the parsed job to an Outcome: look, decide, take over, compute, finish.

Owns the order of these, the lease and its heartbeat. Must not know: click, terminals, signals; it
changes nothing of the process it runs in.
"""

from __future__ import annotations

import logging

from batchinfer.config import Job
from batchinfer.errors import AccessLost, BatchInferError
from batchinfer.ledger import Holder, Lease, Results, layout
from batchinfer.runner.beside import find_beside, warn_of_beside
from batchinfer.runner.claims import whole_shards
from batchinfer.runner.compute import compute
from batchinfer.runner.deaths import refuse_repeated_death
from batchinfer.runner.decide import Complete, Restart, accepted, decide
from batchinfer.runner.finish import count_input, finalise, judge
from batchinfer.runner.heartbeat import Heartbeat
from batchinfer.runner.host import Host
from batchinfer.runner.joined.compute import compute_joined
from batchinfer.runner.look import OutputView, look
from batchinfer.runner.options import RunOptions
from batchinfer.runner.replicas.fleet import compute_on_replicas
from batchinfer.runner.replicas.places import open_places
from batchinfer.runner.session import Session
from batchinfer.runner.shortage import shortages
from batchinfer.runner.start import Start, open_start
from batchinfer.runner.status import Status
from batchinfer.runner.take_over import take_lease, take_over
from batchinfer.telemetry import Outcome

logger = logging.getLogger("batchinfer.runner")


class Run:
    """`run` works, once; the other methods may be called from any thread, before and after it."""

    def __init__(self, job: Job, options: RunOptions, host: Host) -> None:
        self._job = job
        self._options = options
        self._host = host
        self._status = Status(host)
        self._lease: Lease | None = None
        self._is_begun = False  # whether something was written under the lease
        self._heartbeat: Heartbeat | None = None

    @property
    def has_lease(self) -> bool:
        """Whether it took the lease, now or before."""
        return self._lease is not None

    def run(self) -> Outcome:
        """Compute what is not done yet.

        Raises BatchInferError; finished rows are durable either way.
        """
        with shortages():
            try:
                return self._run()
            finally:
                self._release()

    def outcome(self, status: str, exit_code: int, message: str = "") -> Outcome:
        """How it stands, as the outcome of a run that ends so."""
        return self._status.outcome(status, exit_code, message)

    def end(self, exit_code: int) -> None:
        """Write the final status file and give the lease back.

        Raises BatchInferError if the file cannot be written.
        """
        try:
            self._status.write(exit_code)
        finally:
            self._release()

    def _run(self) -> Outcome:
        host = self._host
        host.counters.set_phase("listing input and output")
        listing_begin_s = host.startup.now()
        start = open_start(self._job, self._options, host.stop.should_give_up)
        if (outcome := _complete_already(start)) is not None:
            return outcome
        holder = Holder.current(since=host.clock.utc())
        lease, heartbeat = self._begin_tenure(start, holder)
        view = look(start)  # again, and now nobody else changes what is seen
        decision = accepted(decide(start, view))
        if isinstance(decision, Complete):
            return _nothing_to_do(start, view, decision)
        if isinstance(decision, Restart):
            _check_before_deleting(start)
        session = take_over(start, decision, view, lease, holder)
        self._is_begun = True
        self._status.begin(session)
        host.startup.add("listing", listing_begin_s)
        for note in start.model.notes:
            logger.info("%s", note)
        for warning in start.model.warnings:
            logger.warning("%s", warning)
        return self._finish(session, heartbeat)

    def _finish(self, session: Session, heartbeat: Heartbeat) -> Outcome:
        host = self._host
        finished, is_limited = session.finished, False
        if session.pending:
            count_input(session, host.counters)
            host.log(session.store, session.run)
            is_cautious = not session.options.join and refuse_repeated_death(session)
            places = open_places(session, host.counters)
            if session.options.join:
                computed = compute_joined(session, host, self._status, heartbeat, places)
            elif places is None:
                claims = whole_shards(session)
                computed = compute(
                    session, claims, host, self._status, heartbeat, is_cautious=is_cautious
                )
            else:
                computed = compute_on_replicas(session, host, self._status, heartbeat, places)
            finished = {**finished, **computed.finished}
            is_limited = computed.is_limited
        host.counters.set_phase("finishing")
        outcome = self._status.outcome("partial", 0)
        return finalise(session, finished, outcome, host.clock, is_limited=is_limited)

    def _begin_tenure(self, start: Start, holder: Holder) -> tuple[Lease, Heartbeat]:
        lease = self._lease = take_lease(start, holder)
        heartbeat = self._heartbeat = Heartbeat(lease, self._status, self._host.stop)
        heartbeat.start()
        return lease, heartbeat

    def _release(self) -> None:
        """Give the lease back; a start that was refused leaves an output as it was.

        Never raises: a lease that stays is taken over when its holder is gone.
        """
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._lease is not None:
            try:
                if self._is_begun:
                    self._lease.release()
                else:
                    self._lease.undo()
            except AccessLost:  # whatever else wrote was refused, too, and says so
                logger.debug("could not release the lease: no access")
            except BatchInferError as error:
                logger.warning("could not release the lease: %s", error)


def run_job(job: Job, options: RunOptions, host: Host) -> Outcome:
    """As `Run.run`, for a caller that asks nothing else."""
    return Run(job, options, host).run()


def _complete_already(start: Start) -> Outcome | None:
    """Seen without the lease, which a complete output does not need. One request if it is not."""
    if start.store.stat(layout.SUCCESS_KEY) is None:
        return None
    view = look(start)
    decision = decide(start, view)
    return _nothing_to_do(start, view, decision) if isinstance(decision, Complete) else None


def _check_before_deleting(start: Start) -> None:
    """Whatever can be known of a job without the model in memory. Raises what it is refused for."""
    start.kind.check_fit(start.spec)
    start.task.prompter(start.job, start.model)


def _nothing_to_do(start: Start, view: OutputView, complete: Complete) -> Outcome:
    url = start.store.url
    results = Results(start.store, complete.digest)
    names = (shard.name for shard in start.shards)
    warn_of_beside(results, find_beside(results, view.survey, names))
    logger.info("nothing to do: %s is complete", url)
    counts = start.task.counts
    outcome = Outcome("complete", 0, url, totals=complete.totals, count_names=counts)
    return judge(start, outcome)
