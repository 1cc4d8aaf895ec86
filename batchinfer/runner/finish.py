"""How much there is to do, and what is true of the output when it is done: `_SUCCESS`, exit code 3.

Must not know: engines, threads of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from batchinfer.errors import TooManyFailedRows, TransientError
from batchinfer.ledger import Totals, clear_members, clear_pieces, layout, records, survey
from batchinfer.runner.digest import complete_digest
from batchinfer.runner.record import warn_of_damage
from batchinfer.runner.session import Session
from batchinfer.runner.start import Start
from batchinfer.tasks import Task
from batchinfer.telemetry import Clock, Counters, Outcome

logger = logging.getLogger("batchinfer.runner")


def finalise(
    session: Session,
    finished: Mapping[str, Totals],
    outcome: Outcome,
    clock: Clock,
    *,
    is_limited: bool,
) -> Outcome:
    """Write `_SUCCESS` if every shard of the input has its finished file; say how it stands.

    `finished`: totals of shards whose footers need not be read again. `outcome`: of what the run
    did; it is completed and returned.
    """
    _warn_of_run(session.task, outcome)
    if is_limited:
        _warn(session.task, outcome)
        return outcome
    session.lease.check()
    warn_of_damage(session.store, session.written)
    names = {s.name for s in session.shards}
    listed = survey(session.store)
    own = {s.name for s in session.start.own}
    were_there = own & (session.survey.finished | finished.keys())
    if gone := sorted(were_there - listed.finished):
        raise TransientError(
            f"{session.store.url_of(gone[0])} was deleted while the run worked on it, {len(gone)} "
            "finished files in all. Start again: their rows are computed again"
        )
    if session.options.join and not names - listed.finished and names & listed.with_parts:
        for name in sorted(names & listed.with_parts):  # of members that were late, or killed
            session.ledger.drop_parts(name, session.ledger.parts_of(name))
        listed = survey(session.store)
    if names - listed.finished or names & listed.with_parts:
        _warn(session.task, outcome)
        return outcome  # other slices are not done, or in the middle of a retry
    missing = [s for s in session.shards if s.name not in finished]
    with ThreadPoolExecutor(16, thread_name_prefix="footer") as pool:
        found = pool.map(lambda s: session.ledger.totals_of(s.name), missing)
        known = (finished[name] for name in names & finished.keys())
        totals = sum(found, sum(known, Totals()))
    success = {
        "digest": complete_digest(session.digest, session.shards),
        "job": session.job.name,
        "shards": len(names),
        **totals.as_dict(),
        **session.beside.as_dict(),
        "finished_at": clock.utc(),
    }
    if session.options.join:
        session.store.create(layout.SUCCESS_KEY, records.to_json(success))
        clear_pieces(session.store)
        clear_members(session.store, is_excluded=False)
    else:
        session.store.put(layout.SUCCESS_KEY, records.to_json(success))
    outcome.status = "complete"
    outcome.totals = totals
    return judge(session.start, outcome, session.num_rows_of(session.shards))


def judge(start: Start, outcome: Outcome, num_input_rows: int | None = None) -> Outcome:
    """Exit code 3 for a complete output with too many failed rows, at each start.

    `num_input_rows`: before the filter, None if nobody has counted them.
    """
    job, totals = start.job, outcome.totals
    assert totals is not None
    if job.input.filter is not None and totals.rows == 0 and num_input_rows != 0:
        of = "the input's" if num_input_rows is None else f"{num_input_rows:,}"
        logger.warning("input.filter %r keeps none of %s rows", job.input.filter, of)
    _warn(start.task, outcome)
    if totals.rows_failed > job.limits.max_failed_fraction * totals.rows:
        outcome.exit_code = TooManyFailedRows.exit_code
        outcome.message = (
            f"{totals.rows_failed} of {totals.rows} rows failed, more than "
            f"limits.max_failed_fraction = {job.limits.max_failed_fraction:g} allows: see "
            f"error_type and error_message in {outcome.output}. "
            "--retry-failed computes only those again, which helps rows with engine_error; errors "
            "that the input causes come again"
        )
    return outcome


def _warn(task: Task, outcome: Outcome) -> None:
    """What the task says of its results: of the whole output if it is complete, else of this run.

    They are not errors, but are of little use.
    """
    stands = outcome.as_dict()
    counts = {name: outcome.count(name) for name in task.counts}
    for remark in task.remarks(stands["rows"] - stands["rows_failed"], counts):
        logger.warning("%s", remark)


def _warn_of_run(task: Task, outcome: Outcome) -> None:
    """The same of what the task counts of a run alone."""
    counts = {name: n for name, n in outcome.counts.items() if name not in task.counts}
    for remark in task.remarks(outcome.rows_durable - outcome.rows_failed, counts):
        logger.warning("%s", remark)


def count_input(session: Session, counters: Counters) -> None:
    """What progress is measured against: the slice's rows, those of finished shards as read and
    done.

    With a filter the finished shards are left out: how many of their rows passed is in their
    footers.
    """
    num_samples = session.task.num_samples
    if session.row_filter is not None:
        counters.set_total(session.num_rows_of(session.pending) * num_samples, len(session.pending))
        return
    own = session.start.own
    pending = {shard.name for shard in session.pending}
    num_done = session.num_rows_of([s for s in own if s.name not in pending]) * num_samples
    counters.set_total(session.num_rows_of(own) * num_samples, len(own))
    counters.add_read(num_done, num_done, num_done)
