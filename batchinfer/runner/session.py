"""What must be settled before the first row is read: is there anything to do, and may we do it?

Looks at input, output and model folder; takes the lease; decides between "nothing to do", "refused"
and a run with a number of its own. Loads no model and imports no engine. Everything it writes is
created once or idempotent, so it can be killed anywhere.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from batchinfer import __version__
from batchinfer.config import Job, S3Settings
from batchinfer.errors import ConfigError, InputError, TransientError
from batchinfer.ledger import (
    Holder,
    Lease,
    Ledger,
    Survey,
    Totals,
    acquire_lease,
    layout,
    records,
    survey,
)
from batchinfer.model import ModelFacts
from batchinfer.runner.carried import RECORD_KEY, carried_columns, carried_schema, to_text
from batchinfer.runner.checks import (
    check_schema,
    check_shards,
    digest_in,
    earlier_record,
    recorded_fingerprints,
)
from batchinfer.runner.digest import Identity, complete_digest, identity_of
from batchinfer.runner.ownership import (
    refuse_foreign_files,
    refuse_other_outputs,
    refuse_strangers,
)
from batchinfer.runner.record import create_record, rebuilt_record
from batchinfer.runner.restart import delete_results
from batchinfer.sink.schema import SCHEMA_VERSION
from batchinfer.source import (
    Fingerprint,
    RowFilter,
    Shard,
    list_shards,
    read_footer,
    same_content,
)
from batchinfer.storage import S3Options, Store, open_store
from batchinfer.tasks import task_of
from batchinfer.telemetry import Clock

logger = logging.getLogger("batchinfer.runner")

_FOOTER_THREADS = 16
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line adds to the job for one start."""

    limit: int | None = None
    slice: tuple[int, int] | None = None  # --slice i/n, i from 1
    restart: bool = False
    retry_failed: bool = False

    @property
    def lease_name(self) -> str:
        return "all" if self.slice is None else f"{self.slice[0]}-of-{self.slice[1]}"


@dataclass(slots=True)
class Session:
    """A start that holds the lease and knows what to do."""

    job: Job
    options: RunOptions
    model: ModelFacts
    store: Store
    clock: Clock
    holder: Holder
    lease: Lease
    digest: str
    window_rows: int
    shards: list[Shard]  # the whole input
    ledger: Ledger
    survey: Survey
    row_filter: RowFilter | None
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    carried: pa.Schema | None = None  # the id and kept columns; None: each shard's own types
    pending: list[Shard] = field(default_factory=list)  # of this run's slice
    run: int = 0
    first_run: int = 1  # since the last restart
    finished: dict[str, Totals] = field(
        default_factory=dict
    )  # what is known without reading footers
    written: dict[str, bytes] = field(default_factory=dict)  # records of this start, by key

    def num_rows_of(self, shards: Sequence[Shard]) -> int:
        """Input rows of shards, before the filter."""
        return sum(self.fingerprints[s.name].num_rows for s in shards)

    def slice_of(self, shards: Sequence[Shard]) -> list[Shard]:
        if self.options.slice is None:
            return list(shards)
        index, count = self.options.slice
        return list(shards[index - 1 :: count])

    def check_content(self, shard: Shard, footer_sha256: str) -> None:
        """Raise InputError if a shard of the right size and time has another footer than before.

        Tools that put a file's time back hide what they changed; its footer is read anyway.
        """
        if footer_sha256 != self.fingerprints[shard.name].footer_sha256:
            raise InputError(
                f"{shard.url} is not the file that this output was begun with: its size and time "
                "of change are the same, its footer is another. Bring the old file back, use "
                "another output.path, or delete the old results with --restart (if none of its "
                "rows are computed yet, `touch` it)"
            )

    def recheck(self, shard: Shard) -> None:
        """Raise InputError if the shard is not what it was when this run listed it."""
        now = shard.store.stat(shard.key)
        if now is None or (now.size_bytes, now.version) != (shard.size_bytes, shard.version):
            what = "vanished" if now is None else "changed"
            raise InputError(
                f"{shard.url} {what} while it was computed, so its finished file is not written; "
                "its rows that were durable stay in parts, other shards are not touched. Bring the "
                "old file back and start again, or delete all results with --restart"
            )


def open_output(job: Job, should_stop: Callable[[], bool]) -> Store:
    return open_store(
        job.output.path,
        s3=_s3_options(job.output.s3),
        should_stop=should_stop,
        single_writer=job.output.single_writer,
    )


def list_input(job: Job, should_stop: Callable[[], bool]) -> list[Shard]:
    """All shards of the input, by name.

    Raises InputError if there are none or two would collide.
    """
    s3 = _s3_options(job.input.s3)
    return list_shards(job.input.path, lambda url: open_store(url, s3=s3, should_stop=should_stop))


def _s3_options(settings: S3Settings) -> S3Options:
    return S3Options(**settings.model_dump())


def find_complete(
    options: RunOptions, store: Store, identity: Identity, shards: Sequence[Shard]
) -> Totals | None:
    """Totals if the output is complete for just this job and input: two reads and one listing."""
    if options.restart or options.retry_failed:
        return None
    success = records.read_json(store, layout.SUCCESS_KEY)
    if success is None:
        return None
    record = records.read_json(store, layout.JOB_KEY)
    if record is not None and identity.changes_since(record):
        return None
    if success.get("digest") != complete_digest(digest_in(record, identity), shards):
        return None
    if store.stat(layout.RESTART_KEY) is not None:
        return None
    listed = survey(store)
    names = {s.name for s in shards}
    if names - listed.finished or names & listed.with_parts:
        return None
    return Totals.from_facts(success)


def begin(
    job: Job,
    options: RunOptions,
    *,
    model: ModelFacts,
    store: Store,
    shards: list[Shard],
    clock: Clock,
    versions: dict[str, str],
    on_lease: Callable[[Lease], None],
) -> Session:
    """Take the lease, finish a restart, compare with what is there, and list what is to be done.

    A session whose `pending` is empty has no run number: there is nothing to compute. Raises
    ConfigError, InputError, LeaseHeld.
    """
    identity, task = identity_of(job, model), task_of(job)
    if not job.output.single_writer:
        _require_create(store)
    holder = Holder.current(since=clock.utc())
    single_writer = job.output.single_writer
    lease = acquire_lease(store, options.lease_name, holder, single_writer=single_writer)
    on_lease(lease)
    is_restart = options.restart or store.stat(layout.RESTART_KEY) is not None
    listed = survey(store)
    refuse_other_outputs(store, listed, (shard.name for shard in shards))
    record = None
    if not is_restart:
        window_rows = job.packing.window_rows
        is_whole = options.slice is None
        record = earlier_record(store, listed, identity, window_rows=window_rows, is_whole=is_whole)
    is_recorded = record is not None
    if not is_restart and store.stat(layout.JOB_KEY) is None:
        record = rebuilt_record(store, listed, identity.digest, job)
    window_rows = int(record["window_rows"]) if record else job.packing.window_rows
    if window_rows != job.packing.window_rows:
        logger.warning(
            "packing.window_rows stays %d, with which this output was begun (the job says %d)",
            window_rows,
            job.packing.window_rows,
        )
    digest = digest_in(record, identity)
    facts = {
        "version": __version__,
        "schema_version": SCHEMA_VERSION,
        "job": job.name,
        "digest": digest,
        "model": {"path": job.model.path, "dtype": model.dtype, "quantization": model.quantization},
        **task.facts,
        "window_rows": window_rows,
    }
    ledger = partial(
        Ledger,
        store,
        facts,
        window_rows,
        num_samples=task.num_samples,
        task=task,
        check=lease.check,
    )
    session = Session(
        job=job,
        options=options,
        model=model,
        store=store,
        clock=clock,
        holder=holder,
        lease=lease,
        digest=digest,
        window_rows=window_rows,
        shards=shards,
        ledger=ledger(),
        survey=listed,
        row_filter=RowFilter(job.input.filter) if job.input.filter else None,
    )
    session.first_run = int(record["first_run"]) if record else listed.last_run + 1
    recorded = recorded_fingerprints(store, record)
    if not is_restart:
        refuse_foreign_files(store, listed, recorded if is_recorded else {}, digest)
    # Before anything is deleted or written: a mistake in the job costs no earlier results, and
    # leaves no record that the mended job would not match.
    new = _check_input(session, recorded, record)
    _warn_of_removed(session, recorded)
    if is_restart:
        refuse_strangers(store, listed, digest)
        if options.slice is not None:
            raise TransientError(
                f"a --restart of {store.url} was interrupted: start once without --slice to "
                "finish it"
            )
        delete_results(store, listed, lease)
        session.survey = survey(store)
        refuse_foreign_files(store, session.survey, recorded, digest)
    if record is not None and is_recorded:
        session.written[layout.JOB_KEY] = records.to_json(record)
    else:
        _write_record(session, identity)
    store.sweep(_swept_by(session))
    _settle_leftovers(session)
    session.pending = _pending(session)
    if store.stat(layout.SUCCESS_KEY) is not None:
        # Before anything of a complete output changes (new shards, retries), it is no longer
        # complete.
        store.delete([layout.SUCCESS_KEY])
    if not session.pending:
        return session
    session.run = _number_run(session, versions, new)
    session.ledger = ledger(run=session.run)
    return session


def _swept_by(session: Session) -> Callable[[str], bool]:
    """Which keys' leftovers of dead publishers are this start's to remove.

    A slice's: those of its shards. The whole run's: all of the output's, as nobody else is at work.
    """
    names = {shard.name for shard in session.slice_of(session.shards)}
    if session.options.slice is not None:
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


def _require_create(store: Store) -> None:
    # A name of its own: slices that start at once would take each other's probes for overwriting.
    if store.is_local:
        return  # link(2) and O_EXCL refuse everywhere
    if not store.supports_create(f"{layout.LEASES_PREFIX}probe-{secrets.token_hex(8)}"):
        raise ConfigError(
            f"{store.url}: this store overwrites objects although asked to create them only if "
            "absent (If-None-Match), so two runs on one output could not be told apart. Use another"
            " store, or set output.single_writer: true and let only one run at a time work on it"
        )


def _write_record(session: Session, identity: Identity) -> None:
    created = {
        "name": session.job.name,
        "digest": session.digest,
        "window_rows": session.window_rows,
        "first_run": session.first_run,
        "created_at": session.clock.utc(),
        "ingredients": identity.ingredients,
        "job": session.job.model_dump(mode="json"),
        **({RECORD_KEY: to_text(session.carried)} if session.carried is not None else {}),
    }
    is_whole = session.options.slice is None
    content = create_record(session.store, created, identity, is_whole=is_whole)
    session.written[layout.JOB_KEY] = content


def _last_run(store: Store) -> int:
    numbers = (layout.run_of_key(info.key) for info in store.list(layout.RUNS_PREFIX))
    return max((n for n in numbers if n is not None), default=0)


def _warn_of_removed(session: Session, recorded: dict[str, Fingerprint]) -> None:
    """Results stay when their shard goes, also when it comes back under another name."""
    names = {s.name for s in session.shards}
    removed = sorted((session.survey.finished & recorded.keys()) - names)
    if removed:
        of_them = "is no longer in the input; its results stay"
        if len(removed) > 1:
            of_them = "are no longer in the input; their results stay"
        logger.warning("%s %s", _some_of(removed), of_them)
    current = {
        (now.size_bytes, now.footer_sha256, now.num_rows): now.name
        for now in session.fingerprints.values()
    }
    contents = {
        key: (recorded[key].size_bytes, recorded[key].footer_sha256, recorded[key].num_rows)
        for key in removed
    }
    renamed = [f"{key} (now {current[c]})" for key, c in contents.items() if c in current]
    if renamed:
        logger.warning(
            "the output has rows twice: %s, the same input under another name. Give the file its "
            "old name below input.path, or move one of the two results away",
            _some_of(renamed),
        )


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _check_input(
    session: Session, recorded: dict[str, Fingerprint], record: Mapping[str, Any] | None
) -> list[Fingerprint]:
    """Compare each shard with its record; read the footers of new ones, and settle on the types of
    the columns that are taken over. Returns what is to be recorded.
    """
    new: list[Shard] = []
    changed: list[str] = []
    update: list[Fingerprint] = []
    for shard in session.shards:
        old = recorded.get(shard.name)
        has_results = (
            shard.name in session.survey.finished or shard.name in session.survey.with_parts
        )
        if old is None:
            new.append(shard)
        elif (old.size_bytes, old.version) == (shard.size_bytes, shard.version):
            session.fingerprints[shard.name] = old
        elif same_content(old, shard):
            now = Fingerprint(
                shard.name, shard.size_bytes, shard.version, old.num_rows, old.footer_sha256
            )
            session.fingerprints[shard.name] = now
            update.append(now)
        elif has_results:
            changed.append(
                f"{shard.url}: {old.size_bytes} bytes then, {shard.size_bytes} bytes now"
            )
        else:
            new.append(shard)
    if changed:
        raise InputError(
            "these shards changed since their rows were computed:\n  "
            + "\n  ".join(changed[:20])
            + ("\n  …" if len(changed) > 20 else "")
            + "\nBring the old files back, use another output.path, or delete the old results with "
            "--restart"
        )

    def check(shard: Shard) -> tuple[Fingerprint, pa.Schema]:
        footer = read_footer(shard)
        check_schema(session.job, session.row_filter, shard, footer)
        fingerprint = Fingerprint(
            shard.name, shard.size_bytes, shard.version, footer.num_rows, footer.sha256
        )
        return fingerprint, carried_columns(session.job, footer)

    checked = check_shards(new, check)
    schemas = [schema for _, schema in checked]
    session.carried = carried_schema(session.job, zip(new, schemas, strict=True), record)
    for fingerprint, _ in checked:
        session.fingerprints[fingerprint.name] = fingerprint
        update.append(fingerprint)
    return update


def _settle_leftovers(session: Session) -> None:
    """Parts beside a finished file: a run died before deleting them, or inside a retry."""
    if session.options.retry_failed:
        return  # the retry reads and folds them
    own = {s.name for s in session.slice_of(session.shards)}
    for name in sorted(session.survey.finished & session.survey.with_parts & own):
        session.ledger.settle(name)


def _pending(session: Session) -> list[Shard]:
    own = session.slice_of(session.shards)
    pending = [s for s in own if s.name not in session.survey.finished]
    if session.options.retry_failed:
        finished = [s for s in own if s.name in session.survey.finished]
        with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
            for shard, totals in zip(
                finished,
                pool.map(lambda s: session.ledger.totals_of(s.name), finished),
                strict=True,
            ):
                if totals.rows_failed or shard.name in session.survey.with_parts:
                    pending.append(shard)
                else:
                    session.finished[shard.name] = totals
    return sorted(pending, key=lambda s: s.name)


def _number_run(session: Session, versions: dict[str, str], new: list[Fingerprint]) -> int:
    """Create runs/NNNN.json; the number is ours because the file was created if absent."""
    while True:
        number = max(_last_run(session.store), session.survey.last_run) + 1
        record = {
            "run": number,
            "started_at": session.clock.utc(),
            "holder": asdict(session.holder),
            "options": asdict(session.options),
            "versions": versions,
            "digest": session.digest,
            "job": session.job.model_dump(mode="json"),
            "input": [records.fingerprint_record(f) for f in new],
        }
        content = records.to_json(record)
        if session.store.create(layout.run_key(number), content):
            session.written[layout.run_key(number)] = content
            return number
