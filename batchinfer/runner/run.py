"""One start of a job, from the job file's model to an Outcome.

Wires the rooms together and owns the order of things at the end: stop reading, make finished rows
durable, close the engine, write `_SUCCESS`, the status, give the lease back. Must not know: click,
terminals.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from dataclasses import asdict, dataclass

from batchinfer.config import Job
from batchinfer.engine.base import Engine, EngineFacts, EngineKind
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import EngineDied, InputError, Stopped, TransientError
from batchinfer.ledger import Holder, Totals, layout
from batchinfer.runner.claim import claim, take_lease
from batchinfer.runner.context import RunContext, release, write_status
from batchinfer.runner.deaths import refuse_repeated_death
from batchinfer.runner.decide import Complete, accepted, decide
from batchinfer.runner.factory import build_engine, engine_spec, prompter_of
from batchinfer.runner.finish import count_input, finalise, judge
from batchinfer.runner.heartbeat import Heartbeat
from batchinfer.runner.look import look
from batchinfer.runner.loop import Loop
from batchinfer.runner.malloc import bound_arenas
from batchinfer.runner.options import RunOptions
from batchinfer.runner.reader import Reader
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.record import restore
from batchinfer.runner.session import Session
from batchinfer.runner.shortage import shortages
from batchinfer.runner.start import Start, open_start
from batchinfer.runner.stop import StopControl
from batchinfer.runner.writer import Writer
from batchinfer.tasks import task_of
from batchinfer.telemetry import Counters, Outcome, StartUp, log_event

logger = logging.getLogger("batchinfer.runner")

_REMOTE_READERS = 4
_READER_END_S = 1.5
_CLOSE_S = 10.0


def run_job(job: Job, options: RunOptions, context: RunContext) -> Outcome:
    """Compute what is not done yet.

    Raises BatchInferError; finished rows are durable either way.
    """
    with shortages():
        return _run_job(job, options, context)


def _run_job(job: Job, options: RunOptions, context: RunContext) -> Outcome:
    context.counters.set_phase("listing input and output")
    listing_begin_s = context.startup.now()
    start = open_start(job, options, context.stop.should_give_up)
    if (complete := _complete_already(start)) is not None:
        return _nothing_to_do(start, complete)
    try:
        holder = Holder.current(since=context.clock.utc())
        lease = context.lease = take_lease(start, holder)
        context.heartbeat = Heartbeat(lease, lambda: _show_life(context))
        context.heartbeat.start()
        context.stop.on_request = context.heartbeat.now
        view = look(start)  # again, and now nobody else changes what is seen
        decision = accepted(decide(start, view))
        if isinstance(decision, Complete):
            return _nothing_to_do(start, decision)
        session = context.session = claim(start, decision, view, lease, holder)
        context.startup.add("listing", listing_begin_s)
        for note in start.model.notes:
            logger.info("%s", note)
        for warning in start.model.warnings:
            logger.warning("%s", warning)
        finished, is_limited = session.finished, False
        if session.pending:
            count_input(session, context.counters)
            context.on_run(session)
            context.is_cautious = refuse_repeated_death(session)
            computed, is_limited = _compute(session, context)
            finished = {**finished, **computed}
        return finalise(session, finished, context, is_limited)
    finally:
        release(context)


def _complete_already(start: Start) -> Complete | None:
    """Seen without the lease, which a complete output does not need. One request if it is not."""
    if start.store.stat(layout.SUCCESS_KEY) is None:
        return None
    decision = decide(start, look(start))
    return decision if isinstance(decision, Complete) else None


def _nothing_to_do(start: Start, complete: Complete) -> Outcome:
    url = start.store.url
    logger.info("nothing to do: %s is complete", url)
    token_name = task_of(start.job).counts[0]
    outcome = Outcome("complete", 0, url, totals=complete.totals, token_name=token_name)
    return judge(start.job, outcome)


def _show_life(context: RunContext) -> None:
    if (session := context.session) is not None and session.run:
        session.lease.check()
        restore(session.store, session.written)
    write_status(context)


def _compute(session: Session, context: RunContext) -> tuple[dict[str, Totals], bool]:
    """Run the engine over the pending shards.

    Returns totals of the shards that it finished, and whether `--limit` ended it early.
    """
    job, stop, startup = session.job, context.stop, context.startup
    bound_arenas()
    kind = engine_kind(job.engine.name)
    kind.prepare(engine_spec(job, session.model))
    context.counters.set_max_tokens(task_of(job).max_tokens)
    context.counters.set_phase("loading the tokenizer")
    gc.disable()  # until the engine is imported: it looks at a million objects, and frees a few
    with startup.span("tokenizer"):
        prompter = prompter_of(job, session.model)
    ready = ReadyWork(order=job.packing.order, max_tokens=job.packing.buffer_tokens)
    task = task_of(job)
    writer = Writer(
        session.ledger,
        context.counters,
        run=session.run,
        every_rows=job.checkpoint.every_rows,
        every_s=job.checkpoint.every_s,
        detokenize=prompter.decode,
        task=task,
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
        carried=session.carried,
        ready=ready,
        writer=writer,
        counters=context.counters,
        clock=context.clock,
        window_rows=session.window_rows,
        limit=session.options.limit,
        retry_failed=session.options.retry_failed,
        recheck=session.recheck,
        check_content=session.check_content,
        num_threads=1 if session.pending[0].store.is_local else _REMOTE_READERS,
    )
    assert context.heartbeat is not None
    context.heartbeat.now()
    threads = _Threads(reader, writer, context.heartbeat)
    threads.start()
    importing = _start_import(kind, startup)
    engine: Engine | None = None
    error: BaseException | None = None
    try:
        context.counters.set_phase("reading input")
        with startup.span("first_window"):
            while not (ready.wait(0.2) or ready.is_exhausted or _should_stop(stop, threads)):
                if not importing.is_alive():
                    gc.enable()  # a long look for the first row to compute
        has_work = not ready.is_exhausted and not _should_stop(stop, threads)
        if has_work:
            context.counters.set_phase("importing the engine")
            importing.join()
        gc.freeze()  # modules stay: vLLM collects garbage five times before its first step
        gc.enable()
        if has_work:
            context.counters.set_phase("loading the model")
            with startup.span("model"), kind.phases(context.counters.set_phase):
                engine = build_engine(job, session.model)
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
    if stop.is_requested:  # outranks an engine that died of the same signal
        what = "finished rows are durable" if writer.error is None else f"{writer.error}"
        raise Stopped(f"{stop.reason}: {what}; the next start goes on", stop.code)
    if (error := threads.first_error() or error) is not None:
        if isinstance(error, EngineDied):
            raise EngineDied(f"{error}. Finished rows are durable: start again") from error
        raise error
    if problems := {**reader.input_errors, **writer.input_errors}:
        raise InputError("\n".join(str(problem) for problem in list(problems.values())[:20]))
    return writer.finished, reader.is_limited


def _start_import(kind: EngineKind, startup: StartUp) -> threading.Thread:
    """Import the engine beside the reading of the first rows.

    Not waited for by a start that finds no row to compute.
    """

    def work() -> None:
        try:
            with startup.span("engine_imports"):
                kind.load()
        except Exception as error:  # `build_engine` imports again, and raises what it finds
            logger.info("importing the engine beforehand failed: %s", error)

    thread = threading.Thread(target=work, name="import", daemon=True)
    thread.start()
    return thread


def _close(engine: Engine) -> None:
    """A device that hangs must not keep a finished run from saying so."""
    closing = threading.Thread(target=engine.close, name="close", daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    if closing.is_alive():
        logger.warning("the engine did not shut down within %g s", _CLOSE_S)


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
    loop = context.loop = Loop(
        engine,
        ready,
        threads.writer.put,
        context.counters,
        context.clock,
        job=session.job,
        should_stop=lambda: _should_stop(context.stop, threads),
        is_cautious=context.is_cautious,
        on_first_step=lambda: _end_startup(context, facts),
    )
    if context.stop.begin_admission():
        context.counters.set_phase("generating")
        loop.admit()
        with contextlib.suppress(TransientError):
            write_status(context)  # names the rows in flight before a step can kill us
        try:
            loop.run()
        finally:
            _log_generation(context.counters)


def _end_startup(context: RunContext, facts: EngineFacts) -> None:
    """Log where the time went; of the model's, what the engine said about its parts."""
    startup = context.startup
    model_begin_s, model_end_s = startup.spans["model"]
    if warm_up_s := facts.warm_up_s:
        startup.add("model", model_begin_s, model_end_s - warm_up_s)
        startup.add("compile_and_warm_up", model_end_s - warm_up_s, model_end_s)
    startup.add("first_step", model_end_s)
    startup.end()
    spans = startup.as_dict()
    log_event(logger, logging.INFO, "started_up", total_s=spans.pop("total_s"), spans=spans)


def _log_generation(counters: Counters) -> None:
    snapshot = counters.snapshot()
    log_event(
        logger,
        logging.INFO,
        "generated",
        rows=snapshot.rows_computed,
        tokens_per_s=round(snapshot.mean_tokens_per_s, 1),
        steps=snapshot.num_steps,
        mean_num_running=round(snapshot.mean_num_running, 1),
        share_of_steps_underfilled=round(snapshot.share_of_steps_underfilled, 4),
        stalled_s=round(snapshot.stalled_s, 3),
    )


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
        self.reader.warn_of_shortened()
        self.writer.drain(finish_shards=finish_shards)


def _should_stop(stop: StopControl, threads: _Threads) -> bool:
    return stop.is_requested or threads.first_error() is not None
