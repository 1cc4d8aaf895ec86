"""The one writer of a start: it makes an output this run's, as it was decided.

The order of its steps is the algorithm. Each is created once or idempotent, so that a kill anywhere
leaves what the next start understands:

1. the lease, before anything else: from here on nobody else writes here. What was seen of the
   output before is looked at again, and decided again, under it (`run`); the input listing and the
   model's facts are not, as no lease protects them: each shard is checked again when it is read
   and when it is finished.
2. a restart's deletions, marker first and marker last; all refusals come before them.
3. job.json, before the first result that only it explains.
4. leftovers of dead publishers, then parts beside finished files: only now is the list of what is
   pending true.
5. `_SUCCESS` goes before anything of a complete output changes (new shards, retries).
6. the run's number, last: only a start that computes something has one.

Must not know: engines, threads.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from batchinfer import __version__
from batchinfer.errors import ConfigError
from batchinfer.ledger import (
    Holder,
    Lease,
    Ledger,
    Results,
    Survey,
    Totals,
    acquire_joint,
    acquire_lease,
    clear_members,
    clear_pieces,
    layout,
    records,
    survey,
)
from batchinfer.runner.beside import (
    Beside,
    find_beside,
    warn_of_beside,
    warn_of_renamed,
    warn_of_rewritten,
)
from batchinfer.runner.decide import Restart, Resume
from batchinfer.runner.input import look_at_input
from batchinfer.runner.look import OutputView
from batchinfer.runner.ownership import read_origins, refuse_foreign_files
from batchinfer.runner.record import number_run, write_job_record
from batchinfer.runner.restart import delete_results, marker_of, warn_of_pending
from batchinfer.runner.session import Session
from batchinfer.runner.start import Start
from batchinfer.sink.schema import SCHEMA_VERSION
from batchinfer.source import Shard
from batchinfer.storage import Store

logger = logging.getLogger("batchinfer.runner")

_FOOTER_THREADS = 16


def take_lease(start: Start, holder: Holder) -> Lease:
    """Raises LeaseHeld, naming the holder; ConfigError for a store that can hold nobody off."""
    single_writer = start.job.output.single_writer
    if start.options.join:
        if single_writer:
            raise ConfigError(
                "output.single_writer: true promises that one run at a time works on the output: "
                "remove it, or start without --join"
            )
        _require_create(start.store, "Use another store, or start without --join")
        return acquire_joint(start.store, holder)
    if not single_writer:
        _require_create(
            start.store,
            "Use another store, or set output.single_writer: true and let only one run at a time "
            "work on it",
        )
    return acquire_lease(start.store, start.options.lease_name, holder, single_writer=single_writer)


def take_over(
    start: Start, decision: Resume, view: OutputView, lease: Lease, holder: Holder
) -> Session:
    """Write what the decision says, and list what is to be done.

    `view`: seen under the lease. A session whose `pending` is empty has no run number: there is
    nothing to compute. Raises ConfigError, InputError, LeaseLost, TransientError.
    """
    # Before anything is deleted or written: a mistake in the job costs no earlier results, and
    # leaves no record that the corrected job would not match.
    inputs = look_at_input(start, decision, view.survey)
    listed = view.survey
    beside = Beside()
    if isinstance(decision, Restart):
        if view.pending is not None and not start.options.restart:
            warn_of_pending(view.url, view.pending)
        marker = marker_of(start, holder)
        listed = _delete_results(start.store, listed, lease, marker, decision.digest)
    else:
        results = Results(start.store, decision.digest)
        beside = find_beside(results, listed, (shard.name for shard in start.shards))
        warn_of_beside(results, beside)
        warn_of_renamed(decision, inputs, beside, view.runs)
        warn_of_rewritten(inputs)
    _announce(start, decision)
    if decision.record is not None and decision.is_recorded:
        job_record = records.to_json(decision.record)
    else:
        job_record = write_job_record(start, decision, inputs, holder.since)
    written = {layout.JOB_KEY: job_record}
    _clear(start, listed)
    ledger = partial(open_ledger, start, decision.digest, decision.window_rows, lease)
    _settle_leftovers(start, listed, ledger(run=0))
    pending, finished = _pending(start, listed, ledger(run=0))
    if start.store.stat(layout.SUCCESS_KEY) is not None:
        start.store.delete([layout.SUCCESS_KEY])
    run = 0
    if pending:
        run, run_record = number_run(start, decision, holder, inputs.new, listed.last_run)
        written[layout.run_key(run)] = run_record
    for_run = ledger(run=run)
    for_run.note_inputs(inputs.fingerprints)
    return Session(
        start=start,
        holder=holder,
        lease=lease,
        digest=decision.digest,
        window_rows=decision.window_rows,
        first_run=decision.first_run,
        survey=listed,
        beside=beside,
        fingerprints=inputs.fingerprints,
        carried=inputs.carried,
        ledger=for_run,
        pending=pending,
        finished=finished,
        run=run,
        written=written,
    )


def _require_create(store: Store, advice: str) -> None:
    # A name of its own: slices that start at once would take each other's probes for overwriting.
    if store.is_local:
        return  # link(2) and O_EXCL refuse everywhere
    if not store.supports_create(f"{layout.LEASES_PREFIX}probe-{secrets.token_hex(8)}"):
        raise ConfigError(
            f"{store.url}: this store overwrites objects although asked to create them only if "
            f"absent (If-None-Match), so two runs on one output could not be distinguished. "
            f"{advice}"
        )


def _delete_results(
    store: Store, listed: Survey, lease: Lease, marker: bytes, digest: str
) -> Survey:
    """Delete them; what is there afterwards, which can only be of somebody without the lease."""
    delete_results(store, listed, lease, marker)
    after = survey(store)
    refuse_foreign_files(store.url, read_origins(store, after.finished), digest)
    return after


def _announce(start: Start, decision: Resume) -> None:
    asked = start.job.packing.window_rows
    if decision.record is None:
        return
    if decision.window_rows != asked:
        logger.warning(
            "packing.window_rows stays %d, with which this output was begun (the job says %d)",
            decision.window_rows,
            asked,
        )
    if not decision.is_recorded:
        logger.warning(
            "%s was missing: written again from what the parts and runs say",
            start.store.url_of(layout.JOB_KEY),
        )


def open_ledger(start: Start, digest: str, window_rows: int, lease: Lease, *, run: int) -> Ledger:
    """For a run that writes under this lease; 0: for a start that writes no parts."""
    job, model, task = start.job, start.model, start.task
    facts = {
        "version": __version__,
        "schema_version": SCHEMA_VERSION,
        "job": job.name,
        "digest": digest,
        "model": {"path": job.model.path, "dtype": model.dtype, "quantization": model.quantization},
        **task.facts,
        "window_rows": window_rows,
    }
    ledger = Ledger(
        start.store,
        facts,
        window_rows,
        num_samples=task.num_samples,
        task=task,
        run=run,
        check=lease.check,
    )
    if run and start.options.join:
        ledger.share()
    return ledger


def _clear(start: Start, listed: Survey) -> None:
    """Remove what dead runs left that is no result."""
    if start.options.join:
        return  # others are publishing
    if start.options.is_whole and listed.has_joined:
        clear_pieces(start.store)
        clear_members(start.store, is_excluded=True)
    start.store.sweep(_swept_by(start))


def _swept_by(start: Start) -> Callable[[str], bool]:
    """Which keys' leftovers of dead publishers are this start's to remove.

    A slice's: those of its shards. The whole run's: all of the output's, as nobody else is at work.
    """
    names = {shard.name for shard in start.own}
    if start.options.slice is not None:
        return lambda key: _shard_of(key) in names
    names.add(layout.SUCCESS_KEY)
    # Not where others who do not hold the lease may be writing: `doctor`, starts on S3.
    return lambda key: (
        key in names
        or (key.startswith(f"{layout.META}/") and not key.startswith(layout.LEASES_PREFIX))
    )


def _shard_of(key: str) -> str:
    parsed = layout.parse_part_key(key) if key.startswith(layout.PARTS_PREFIX) else None
    return parsed[0] if parsed else key


def _settle_leftovers(start: Start, listed: Survey, ledger: Ledger) -> None:
    """Parts beside a finished file: a run died before deleting them, or inside a retry."""
    if start.options.retry_failed:
        return  # the retry reads and folds them
    names = {shard.name for shard in start.own}
    for name in sorted(listed.finished & listed.with_parts & names):
        ledger.settle(name)


def _pending(start: Start, listed: Survey, ledger: Ledger) -> tuple[list[Shard], dict[str, Totals]]:
    """The slice's shards with something to compute; totals of those whose footers were read."""
    pending = [s for s in start.own if s.name not in listed.finished]
    complete: dict[str, Totals] = {}
    if start.options.retry_failed:
        finished = [s for s in start.own if s.name in listed.finished]
        with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
            totals_of = pool.map(lambda s: ledger.totals_of(s.name), finished)
            for shard, totals in zip(finished, totals_of, strict=True):
                if totals.rows_failed or shard.name in listed.with_parts:
                    pending.append(shard)
                else:
                    complete[shard.name] = totals
    return sorted(pending, key=lambda s: s.name), complete
