"""What must be settled before the first row is read: is there anything to do, and may we do it?

Looks at input, output and model folder; takes the lease; decides between "nothing to do", "refused"
and a run with a number of its own. Loads no model and imports no engine. Everything it writes is
created once or idempotent, so it can be killed anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from batchinfer import __version__
from batchinfer.checkpoint import (
    Holder,
    Lease,
    Ledger,
    Survey,
    Totals,
    acquire_lease,
    layout,
    records,
)
from batchinfer.config import Job
from batchinfer.errors import ConfigError, InputError, RepeatedDeath, TransientError
from batchinfer.model import ModelFacts
from batchinfer.sink import OUTPUT_COLUMNS
from batchinfer.sink.schema import SCHEMA_VERSION
from batchinfer.source import (
    Fingerprint,
    Footer,
    RowFilter,
    Shard,
    check_columns,
    list_shards,
    matches,
    read_footer,
    same_content,
)
from batchinfer.storage import S3Options, Store, open_store
from batchinfer.telemetry import Clock

logger = logging.getLogger("batchinfer.runner")

T = TypeVar("T")

_FOOTER_THREADS = 16


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line adds to the job for one start."""

    limit: int | None = None
    slice: tuple[int, int] | None = None  # --shard i/n, i from 1
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
    pending: list[Shard] = field(default_factory=list)  # of this run's slice
    run: int = 0
    finished: dict[str, Totals] = field(
        default_factory=dict
    )  # what is known without reading footers

    @property
    def num_pending_rows(self) -> int:
        """Input rows of the pending shards, before the filter."""
        return sum(self.fingerprints[s.name].num_rows for s in self.pending)

    def slice_of(self, shards: Sequence[Shard]) -> list[Shard]:
        if self.options.slice is None:
            return list(shards)
        index, count = self.options.slice
        return list(shards[index - 1 :: count])

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
    return open_store(job.output.path, s3=_s3_options(job.output.s3), should_stop=should_stop)


def list_input(job: Job, should_stop: Callable[[], bool]) -> list[Shard]:
    """All shards of the input, by name.

    Raises InputError if there are none or two would collide.
    """
    s3 = _s3_options(job.input.s3)
    return list_shards(job.input.path, lambda url: open_store(url, s3=s3, should_stop=should_stop))


def _s3_options(settings: Any) -> S3Options:
    return S3Options(
        endpoint_url=settings.endpoint_url,
        profile=settings.profile,
        region=settings.region,
        anonymous=settings.anonymous,
    )


def digest_ingredients(job: Job, model: ModelFacts) -> dict[str, Any]:
    """What decides the content of the output. Everything else may change between runs."""
    dump = job.model_dump(mode="json")
    return {
        "schema_version": SCHEMA_VERSION,
        "prompt": dump["prompt"],
        "sampling": dump["sampling"],
        "input": {name: dump["input"][name] for name in ("filter", "id_column", "keep_columns")},
        "model": {
            "dtype": model.dtype,
            "quantization": model.quantization,
            "content": dict(model.digest),
        },
    }


def complete_digest(digest: str, shards: Sequence[Shard]) -> str:
    """What `_SUCCESS` holds: the job and the input listing together."""
    return records.digest_of(
        {
            "job": digest,
            "input": records.listing_digest((s.name, s.size_bytes, s.version) for s in shards),
        }
    )


def find_complete(
    job: Job, options: RunOptions, store: Store, digest: str, shards: Sequence[Shard]
) -> Totals | None:
    """Totals if the output is complete for just this job and input: one read and one listing."""
    if options.restart or options.retry_failed:
        return None
    success = records.read_json(store, layout.SUCCESS_KEY)
    if success is None or success.get("digest") != complete_digest(digest, shards):
        return None
    if store.stat(layout.RESTART_KEY) is not None:
        return None
    missing = {s.name for s in shards} - {info.key for info in _finished_files(store)}
    return None if missing else Totals.from_facts(success)


def check_layout(job: Job, store: Store, shards: Sequence[Shard]) -> None:
    """Refuse outputs that would be inputs of the next run, inputs inside the output, colliding
    columns.
    """
    for shard in shards:
        if shard.url == store.url or shard.url.startswith(store.url + "/"):
            raise ConfigError(
                f"input {shard.url} lies inside output.path {store.url}: choose another output.path"
            )
        if matches(job.input.path, store.url_of(shard.name)):
            raise ConfigError(
                f"the output file {store.url_of(shard.name)} would match input.path and be read as "
                "input by the next run: choose an output.path outside the input"
            )
    reserved = {"id", *OUTPUT_COLUMNS}
    if colliding := sorted(reserved.intersection(job.input.keep_columns)):
        raise ConfigError(
            f"input.keep_columns: {', '.join(colliding)} would collide with the output's own "
            "columns (the id is always there as `id`); rename them in the input or do not keep them"
        )


def needed_columns(
    job: Job, prompt_columns: Iterable[str], row_filter: RowFilter | None
) -> list[str]:
    """Input columns that the job reads."""
    names = [*prompt_columns, *job.input.keep_columns]
    if job.input.id_column:
        names.append(job.input.id_column)
    if row_filter is not None:
        names.extend(row_filter.columns)
    return list(dict.fromkeys(names))


def begin(
    job: Job,
    options: RunOptions,
    *,
    model: ModelFacts,
    store: Store,
    shards: list[Shard],
    prompt_columns: Callable[[Sequence[str]], Sequence[str]],
    clock: Clock,
    versions: dict[str, str],
    on_lease: Callable[[Lease], None],
) -> Session:
    """Take the lease, finish a restart, compare with what is there, and list what is to be done.

    `prompt_columns(available)` tells which input columns the prompt needs. A session whose
    `pending` is empty has no run number: there is nothing to compute. Raises ConfigError,
    InputError, LeaseHeld, RepeatedDeath.
    """
    ingredients = digest_ingredients(job, model)
    digest = records.digest_of(ingredients)
    if not job.output.single_writer:
        _require_create(store)
    holder = Holder.current(since=clock.utc())
    lease = acquire_lease(store, options.lease_name, holder)
    on_lease(lease)
    is_restart = options.restart or store.stat(layout.RESTART_KEY) is not None
    survey = Ledger(store, {}, 1).survey()
    record = None if is_restart else _earlier_record(store, options, survey, digest, ingredients)
    window_rows = int(record["window_rows"]) if record else job.packing.window_rows
    if window_rows != job.packing.window_rows:
        logger.warning(
            "packing.window_rows stays %d, with which this output was begun (the job says %d)",
            window_rows,
            job.packing.window_rows,
        )
    facts = {
        "version": __version__,
        "schema_version": SCHEMA_VERSION,
        "job": job.name,
        "digest": digest,
        "model": {"path": job.model.path, "dtype": model.dtype, "quantization": model.quantization},
        "sampling": ingredients["sampling"],
        "window_rows": window_rows,
    }
    ledger = Ledger(store, facts, window_rows)
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
        ledger=ledger,
        survey=survey,
        row_filter=RowFilter(job.input.filter) if job.input.filter else None,
    )
    recorded = _recorded_fingerprints(store, int(record["first_run"])) if record else {}
    if not is_restart:
        _refuse_foreign_files(session, recorded)
    # Before anything is deleted or written: a mistake in the job costs no earlier results, and
    # leaves no record that the mended job would not match.
    new = _check_input(session, recorded, prompt_columns)
    if is_restart:
        _restart(store, options)
        session.survey = ledger.survey()
        _refuse_foreign_files(session, recorded)
    if record is None:
        _create_record(session, ingredients)
    owned = {s.name for s in session.slice_of(shards)}
    store.sweep(lambda key: _shard_of(key) in owned)
    _settle_leftovers(session)
    session.pending = _pending(session)
    if store.stat(layout.SUCCESS_KEY) is not None:
        # Before anything of a complete output changes (new shards, retries), it is no longer
        # complete.
        store.delete([layout.SUCCESS_KEY])
    if not session.pending:
        return session
    _refuse_repeated_death(session, versions)
    session.run = _number_run(session, versions, new)
    return session


def _shard_of(key: str) -> str:
    parsed = layout.parse_part_key(key) if key.startswith(layout.PARTS_PREFIX) else None
    return parsed[0] if parsed else key


def _require_create(store: Store) -> None:
    if not store.supports_create(f"{layout.LEASES_PREFIX}probe"):
        raise ConfigError(
            f"{store.url}: this store overwrites objects although asked to create them only if "
            "absent (If-None-Match), so two runs on one output could not be told apart. Use another"
            " store, or set output.single_writer: true and let only one run at a time work on it"
        )


def _finished_files(store: Store) -> Iterable[Any]:
    for info in store.list():
        if info.key.endswith(".parquet") and not info.key.startswith(f"{layout.META}/"):
            yield info


def _restart(store: Store, options: RunOptions) -> None:
    """Delete all results, so that every kill in between is finished by the next start.

    The marker goes first and last. Run numbers stay: a part's name must never come twice.
    """
    if options.slice is not None:
        raise ConfigError("--restart concerns the whole output: use it without --shard")
    store.create(layout.RESTART_KEY, records.to_json({"restart": True}))
    store.delete([layout.SUCCESS_KEY])
    probe = Ledger(store, {"digest": ""}, 1)
    for info in _finished_files(store):
        if probe.facts_of(info.key) is not None:
            store.delete([info.key])
    for prefix in (layout.PARTS_PREFIX, layout.UNREADABLE_PREFIX):
        store.delete(info.key for info in store.list(prefix))
    store.delete([layout.JOB_KEY])
    store.delete([layout.RESTART_KEY])
    logger.info("restart: earlier results deleted from %s", store.url)


def _earlier_record(
    store: Store, options: RunOptions, survey: Survey, digest: str, ingredients: dict[str, Any]
) -> dict[str, Any] | None:
    """job.json of this output, None if nothing was begun. Raises ConfigError for another job's.

    Another job's record without a single result is dropped by a run on the whole input: what the
    first start could not know (the engine refused a setting) may be mended in the job file.
    """
    record = records.read_json(store, layout.JOB_KEY)
    if record is None or record["digest"] == digest:
        return record
    if options.slice is None and not survey.finished and not survey.with_parts:
        store.delete([layout.JOB_KEY])
        return None
    raise _other_settings(store, record, ingredients)


def _create_record(session: Session, ingredients: dict[str, Any]) -> None:
    """Write job.json. Raises if another slice was faster, with something else."""
    store, job = session.store, session.job
    created = {
        "name": job.name,
        "digest": session.digest,
        "window_rows": session.window_rows,
        "first_run": _last_run(store) + 1,
        "created_at": session.clock.utc(),
        "ingredients": ingredients,
        "job": job.model_dump(mode="json"),
    }
    if store.create(layout.JOB_KEY, records.to_json(created)):
        return
    record = records.read_json(store, layout.JOB_KEY)
    if record is not None and record["digest"] != session.digest:
        raise _other_settings(store, record, ingredients)
    if record is None or int(record["window_rows"]) != session.window_rows:
        raise TransientError(
            f"another run began {store.url} at the same moment with another packing.window_rows: "
            "start again"
        )


def _other_settings(
    store: Store, record: dict[str, Any], ingredients: dict[str, Any]
) -> ConfigError:
    changes = records.changed_ingredients(record["ingredients"], ingredients)
    return ConfigError(
        f"the results in {store.url} were computed with other settings:\n  "
        + "\n  ".join(changes)
        + "\nUse another output.path, set it back, or delete the old results with --restart"
    )


def _last_run(store: Store) -> int:
    numbers = (layout.run_of_key(info.key) for info in store.list(layout.RUNS_PREFIX))
    return max((n for n in numbers if n is not None), default=0)


def _recorded_fingerprints(store: Store, first_run: int) -> dict[str, Fingerprint]:
    """What each shard looked like when its rows were computed; later runs list only what is new."""
    recorded: dict[str, Fingerprint] = {}
    for info in store.list(layout.RUNS_PREFIX):
        number = layout.run_of_key(info.key)
        if number is None or number < first_run:
            continue
        record = records.read_json(store, info.key)
        for entry in (record or {}).get("input", []):
            recorded[entry[0]] = Fingerprint(*entry)
    return recorded


def _refuse_foreign_files(session: Session, recorded: dict[str, Fingerprint]) -> None:
    """A `.parquet` that is not ours must not be mistaken for a result, nor be among them."""
    names = {s.name for s in session.shards}
    for key in sorted(session.survey.finished):
        if key in recorded:
            if key not in names:
                logger.warning("%s is no longer in the input; its results stay", key)
            continue
        facts = session.ledger.facts_of(key)
        if facts is None or facts.get("digest") != session.digest:
            raise ConfigError(
                f"{session.store.url_of(key)} is not a result of this job: choose an empty "
                "output.path, or move the file away"
            )


def _check_input(
    session: Session,
    recorded: dict[str, Fingerprint],
    prompt_columns: Callable[[Sequence[str]], Sequence[str]],
) -> list[Fingerprint]:
    """Compare each shard with its record; read the footers of new ones.

    Returns what is to be recorded.
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

    def check(shard: Shard) -> Fingerprint:
        footer = read_footer(shard)
        _check_schema(session, shard, footer, prompt_columns)
        return Fingerprint(
            shard.name, shard.size_bytes, shard.version, footer.num_rows, footer.sha256
        )

    for fingerprint in check_shards(new, check):
        session.fingerprints[fingerprint.name] = fingerprint
        update.append(fingerprint)
    return update


def check_shards(shards: Sequence[Shard], check: Callable[[Shard], T]) -> list[T]:
    """What `check` says of each shard, several at a time.

    Raises one InputError that names every shard (up to 20) for which it raised ConfigError.
    """

    def caught(shard: Shard) -> T | ConfigError:
        try:
            return check(shard)
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        answers = list(pool.map(caught, shards))
    errors = [answer for answer in answers if isinstance(answer, ConfigError)]
    if errors:
        problems = list(dict.fromkeys(map(str, errors)))  # a problem of the job comes once a shard
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError("\n".join(problems[:20]) + more) from errors[0]
    return [answer for answer in answers if not isinstance(answer, ConfigError)]


def _check_schema(
    session: Session,
    shard: Shard,
    footer: Footer,
    prompt_columns: Callable[[Sequence[str]], Sequence[str]],
) -> None:
    available = [*footer.schema.names, *(name for name, _ in shard.partitions)]
    needed = needed_columns(session.job, prompt_columns(available), None)
    check_columns(footer, needed, shard)
    if session.row_filter is not None:
        session.row_filter.check(footer.schema, [name for name, _ in shard.partitions])


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
                finished, pool.map(lambda s: totals_of(session, s), finished), strict=True
            ):
                if totals.rows_failed or shard.name in session.survey.with_parts:
                    pending.append(shard)
                else:
                    session.finished[shard.name] = totals
    return sorted(pending, key=lambda s: s.name)


def totals_of(session: Session, shard: Shard) -> Totals:
    """Totals in a finished file. Raises ConfigError if the file is not ours."""
    totals = session.ledger.totals_of(shard.name)
    if totals is None:
        raise ConfigError(
            f"{session.store.url_of(shard.name)} is not a result of batchinfer: move it away "
            "and start again"
        )
    return totals


def _refuse_repeated_death(session: Session, versions: dict[str, str]) -> None:
    """Two starts that died with rows in flight and nothing durable: do not try a third time
    unasked.

    The refusal is a run of its own, so the start after it tries once more.
    """
    deaths = []
    for number in range(_last_run(session.store), 0, -1):
        status = records.read_json(session.store, layout.status_key(number)) or {}
        if status.get("slice", "all") != session.options.lease_name:
            continue
        if (
            status.get("state") == "ended"
            or status.get("rows_durable", 0)
            or not status.get("in_flight")
        ):
            return
        deaths.append(status)
        if len(deaths) == 2:
            break
    if len(deaths) < 2:
        return
    session.run = _number_run(session, versions, [])
    both = [row for row in deaths[0]["in_flight"] if row in set(deaths[1]["in_flight"])]
    rows = ", ".join((both or deaths[0]["in_flight"])[:20])
    raise RepeatedDeath(
        "the last two runs died without one new durable row. In flight were (shard:row): "
        f"{rows}. Look at {session.store.url_of(layout.LOGS_PREFIX)} for why; exclude the row with "
        "input.filter or lower engine.max_num_seqs. The next start tries once more"
    )


def _number_run(session: Session, versions: dict[str, str], new: list[Fingerprint]) -> int:
    """Create runs/NNNN.json; the number is ours because the file was created if absent."""
    while True:
        number = _last_run(session.store) + 1
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
        if session.store.create(layout.run_key(number), records.to_json(record)):
            return number
