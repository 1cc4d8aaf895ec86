"""One start of a job, from the job file's model to an Outcome.

Wires the rooms together and owns the order of things at the end: stop reading, make finished rows
durable, close the engine, write `_SUCCESS`, the status, give the lease back. Must not know: click,
terminals.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import pyarrow as pa

from batchinfer import __version__
from batchinfer.checkpoint import Lease, Totals, layout, records
from batchinfer.config import Job
from batchinfer.engine.base import Engine
from batchinfer.errors import (
    BatchInferError,
    EngineDied,
    InputError,
    Stopped,
    TooManyFailedRows,
    TransientError,
)
from batchinfer.model import read_model
from batchinfer.prompt import Prompter
from batchinfer.runner.checks import check_layout
from batchinfer.runner.deaths import refuse_repeated_death
from batchinfer.runner.factory import EngineFactory
from batchinfer.runner.heartbeat import Heartbeat
from batchinfer.runner.loop import Loop, backlog_of
from batchinfer.runner.reader import Reader
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.session import (
    RunOptions,
    Session,
    begin,
    complete_digest,
    digest_ingredients,
    find_complete,
    list_input,
    open_output,
    totals_of,
)
from batchinfer.runner.stop import StopControl
from batchinfer.runner.writer import Writer
from batchinfer.telemetry import Clock, Counters, log_event, status_record

logger = logging.getLogger("batchinfer.runner")

_MIN_READY_ROWS = 4096
_MAX_READY_BYTES = 16 << 20  # token ids, the id and the kept columns
_REMOTE_READERS = 4
_READER_END_S = 1.5
_CLOSE_S = 10.0


@dataclass(slots=True)
class Outcome:
    """How a start ended. `rows` are results: input rows times samples."""

    status: str  # complete | partial | stopped | failed
    exit_code: int
    output: str
    message: str = ""
    run: int | None = None
    totals: Totals | None = None  # of the whole output, when it is complete
    rows_durable: int = 0  # of this run
    rows_failed: int = 0  # of this run, or of the output when it is complete
    rows_computed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    generation_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The JSON line on stdout."""
        speed = self.completion_tokens / self.generation_s if self.generation_s else 0.0
        return {
            "status": self.status,
            "exit_code": self.exit_code,
            "run": self.run,
            "rows": self.totals.rows if self.totals else self.rows_durable,
            "rows_failed": self.totals.rows_failed if self.totals else self.rows_failed,
            "rows_computed": self.rows_computed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "generation_s": round(self.generation_s, 3),
            "completion_tokens_per_s": round(speed, 1),
            "output": self.output,
            "message": self.message,
        }


@dataclass(slots=True)
class RunContext:
    """What a start shares with its caller and its watchdog."""

    clock: Clock
    stop: StopControl
    counters: Counters
    on_run: Callable[[Session], None] = lambda session: None  # a run number was given out
    heartbeat: Heartbeat | None = None
    lease: Lease | None = None
    session: Session | None = None
    loop: Loop | None = None
    is_engine_dead: bool = False
    status_lock: threading.Lock = field(default_factory=threading.Lock)
    is_status_final: bool = False


def run_job(job: Job, options: RunOptions, factory: EngineFactory, context: RunContext) -> Outcome:
    """Compute what is not done yet.

    Raises BatchInferError; finished rows are durable either way.
    """
    store = open_output(job, context.stop.should_give_up)
    context.counters.set_phase("listing input and output")
    model = read_model(
        job.model.path,
        tokenizer=job.model.tokenizer,
        revision=job.model.revision,
        dtype=job.model.resolved_dtype,
        quantization=job.model.quantization,
        max_model_len=job.model.max_model_len,
        needs_weights=job.engine.options.get("load_format") != "dummy",
    )
    shards = list_input(job, context.stop.should_give_up)
    check_layout(job, store, shards)
    digest = records.digest_of(digest_ingredients(job, model))
    totals = find_complete(job, options, store, digest, shards)
    if totals is not None:
        logger.info("nothing to do: %s is complete", store.url)
        return _judge(job, Outcome("complete", 0, store.url, totals=totals))
    versions = {"batchinfer": __version__} | {
        name: metadata.version(name) for name in ("pyarrow", "polars") if _is_installed(name)
    }

    def note_lease(lease: Lease) -> None:
        context.lease = lease
        context.heartbeat = Heartbeat(lease, lambda: write_status(context))
        context.heartbeat.start()
        context.stop.on_request = context.heartbeat.now

    try:
        session = begin(
            job,
            options,
            model=model,
            store=store,
            shards=shards,
            clock=context.clock,
            versions=versions,
            on_lease=note_lease,
        )
        context.session = session
        for note in model.notes:
            logger.info("%s", note)
        if session.pending:
            _count_input(session, context.counters)
            context.on_run(session)
            refuse_repeated_death(session)
            is_limited = _compute(session, factory, context)
        else:
            is_limited = False
        return _finalise(session, context, is_limited)
    finally:
        release(context)


def _count_input(session: Session, counters: Counters) -> None:
    """What progress is measured against: the slice's rows, those of finished shards as read and
    done.

    With a filter the finished shards are left out: how many of their rows passed is in their
    footers.
    """
    num_samples = session.job.sampling.n
    if session.row_filter is not None:
        counters.set_total(session.num_rows_of(session.pending) * num_samples, len(session.pending))
        return
    own = session.slice_of(session.shards)
    pending = {shard.name for shard in session.pending}
    num_done = session.num_rows_of([s for s in own if s.name not in pending]) * num_samples
    counters.set_total(session.num_rows_of(own) * num_samples, len(own))
    counters.add_read(num_done, num_done, num_done)


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


def _compute(session: Session, factory: EngineFactory, context: RunContext) -> bool:
    """Run the engine over the pending shards. Returns whether `--limit` ended it early."""
    job, stop = session.job, context.stop
    _release_freed_memory()
    factory.prepare(job, session.model)
    context.counters.set_phase("loading the tokenizer")
    prompter = Prompter(
        job.prompt,
        session.model.tokenizer_path,
        max_model_len=session.model.max_model_len,
        max_tokens=job.sampling.max_tokens,
        vocab_size=session.model.vocab_size,
        trust_remote_code=job.model.trust_remote_code,
    )
    ready = ReadyWork(min_rows=_MIN_READY_ROWS, max_bytes=_MAX_READY_BYTES)
    structured = job.sampling.structured
    writer = Writer(
        session.ledger,
        context.counters,
        run=session.run,
        every_rows=job.checkpoint.every_rows,
        every_s=job.checkpoint.every_s,
        detokenize=prompter.decode,
        parse_json=structured is not None and structured.json_schema is not None,
        should_stop=lambda: stop.is_requested,
        on_first_durable=lambda: context.heartbeat.now() if context.heartbeat else None,
    )
    reader = Reader(
        job,
        session.pending,
        survey=session.survey,
        ledger=session.ledger,
        prompter=prompter,
        row_filter=session.row_filter,
        ready=ready,
        writer=writer,
        counters=context.counters,
        clock=context.clock,
        window_rows=session.window_rows,
        limit=session.options.limit,
        retry_failed=session.options.retry_failed,
        recheck=session.recheck,
        num_threads=1 if session.pending[0].store.is_local else _REMOTE_READERS,
    )
    assert context.heartbeat is not None
    context.heartbeat.now()
    threads = _Threads(reader, writer, context.heartbeat)
    threads.start()
    engine: Engine | None = None
    error: BaseException | None = None
    try:
        context.counters.set_phase("reading input")
        while not ready.wait(0.2) and not ready.is_exhausted and not _should_stop(stop, threads):
            pass
        if not ready.is_exhausted and not _should_stop(stop, threads):
            context.counters.set_phase("loading the model")
            engine = factory.build(job, session.model)
            _generate(engine, session, ready, threads, context)
    except BaseException as caught:  # what is finished is made durable before it goes on
        error = caught
    error = threads.first_error() or error
    context.is_engine_dead = isinstance(error, EngineDied)
    if error is not None:
        stop.give_up_retrying()
    context.counters.set_phase("writing finished rows")
    threads.end(finish_shards=error is None and not stop.is_requested)
    if engine is not None:
        _close(engine)
    session.finished |= writer.finished
    if stop.is_requested:  # outranks an engine that died of the same signal
        what = "finished rows are durable" if writer.error is None else f"{writer.error}"
        raise Stopped(f"{stop.reason}: {what}; the next start goes on", stop.code)
    if (error := threads.first_error() or error) is not None:
        if isinstance(error, EngineDied):
            raise EngineDied(f"{error}. Finished rows are durable: start again") from error
        raise error
    if problems := {**reader.input_errors, **writer.input_errors}:
        raise InputError("\n".join(str(problem) for problem in list(problems.values())[:20]))
    return reader.is_limited


def _close(engine: Engine) -> None:
    """A device that hangs must not keep a finished run from saying so."""
    closing = threading.Thread(target=engine.close, name="close", daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    if closing.is_alive():
        logger.warning("the engine did not shut down within %g s", _CLOSE_S)


def _release_freed_memory() -> None:
    """Let Arrow take the allocator that gives freed pages back, where its build has it.

    The default keeps them: 320 MB over the start against 250 MB with rows of 20 kB.
    """
    with contextlib.suppress(NotImplementedError):
        pa.set_memory_pool(pa.jemalloc_memory_pool())


def _generate(
    engine: Engine,
    session: Session,
    ready: ReadyWork,
    threads: _Threads,
    context: RunContext,
) -> None:
    facts = engine.facts
    log_event(logger, logging.INFO, "engine_ready", **asdict(facts))
    session.ledger.add_facts(engine=asdict(facts))
    ready.raise_min_rows(2 * facts.max_num_seqs + backlog_of(facts.max_num_seqs))
    loop = context.loop = Loop(
        engine,
        ready,
        threads.writer.put,
        context.counters,
        context.clock,
        job=session.job,
        should_stop=lambda: _should_stop(context.stop, threads),
    )
    if context.stop.begin_admission():
        context.counters.set_phase("generating")
        loop.admit()
        with contextlib.suppress(TransientError):
            write_status(context)  # names the rows in flight before a step can kill us
        loop.run()


@dataclass(slots=True)
class _Threads:
    """What works beside the main thread, and the errors that end the run."""

    reader: Reader
    writer: Writer
    heartbeat: Heartbeat

    def start(self) -> None:
        self.writer.start()
        self.reader.start()

    def first_error(self) -> BaseException | None:
        return self.writer.error or self.reader.error or self.heartbeat.error

    def end(self, *, finish_shards: bool) -> None:
        self.reader.stop()
        self.reader.join(_READER_END_S)
        self.writer.drain(finish_shards=finish_shards)


def _should_stop(stop: StopControl, threads: _Threads) -> bool:
    return stop.is_requested or threads.first_error() is not None


def _finalise(session: Session, context: RunContext, is_limited: bool) -> Outcome:
    """Write `_SUCCESS` if every shard of the input has its finished file; say how it stands."""
    context.counters.set_phase("finishing")
    outcome = outcome_of(context, "partial", 0)
    if is_limited:
        return outcome
    names = {s.name for s in session.shards}
    survey = session.ledger.survey()
    if names - survey.finished or names & survey.with_parts:
        return outcome  # other slices are not done, or in the middle of a retry
    missing = [s for s in session.shards if s.name not in session.finished]
    with ThreadPoolExecutor(16, thread_name_prefix="footer") as pool:
        found = pool.map(lambda s: totals_of(session, s), missing)
        known = (session.finished[name] for name in names & session.finished.keys())
        totals = sum(found, sum(known, Totals()))
    success = {
        "digest": complete_digest(session.digest, session.shards),
        "job": session.job.name,
        "shards": len(names),
        **totals.as_dict(),
        "finished_at": context.clock.utc(),
    }
    session.store.put(layout.SUCCESS_KEY, records.to_json(success))
    outcome.status = "complete"
    outcome.totals = totals
    return _judge(session.job, outcome)


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
        rows_computed=snapshot.rows_computed,
        prompt_tokens=snapshot.prompt_tokens,
        completion_tokens=snapshot.completion_tokens,
        generation_s=snapshot.generation_s,
    )


def _judge(job: Job, outcome: Outcome) -> Outcome:
    """Exit code 3 for a complete output with too many failed rows, at each start."""
    totals = outcome.totals
    assert totals is not None
    if totals.rows_failed > job.limits.max_failed_fraction * totals.rows:
        outcome.exit_code = TooManyFailedRows.exit_code
        outcome.message = (
            f"{totals.rows_failed} of {totals.rows} rows failed, more than "
            f"limits.max_failed_fraction = {job.limits.max_failed_fraction:g} allows: see "
            f"error_type and error_message in {outcome.output}. "
            "--retry-failed computes only those again"
        )
    return outcome


def write_status(context: RunContext, exit_code: int | None = None) -> None:
    """Rewrite this run's status file; an exit code says that the run has ended."""
    session = context.session
    if session is None or not session.run:
        return
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
        exit_code=exit_code,
    )
    with context.status_lock:  # a late beat must not overwrite the last word
        if not context.is_status_final:
            context.is_status_final = exit_code is not None
            session.store.put(layout.status_key(session.run), records.to_json(record))


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
