"""The engine over the claimed windows: what is started when, and how all of it ends.

Tokenizer, reading, and the engine's imports begin together; the model is loaded only once there is
a row to compute. Whatever ends it, finished rows are made durable first. Must not know: leases,
what is done already.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from batchinfer.engine.base import Engine, EngineFacts, EngineKind, MeasurableEngine
from batchinfer.errors import EngineDied, TransientError
from batchinfer.ledger import Totals
from batchinfer.runner.claims import Claim
from batchinfer.runner.ending import Causes, bad_input, end, stopped
from batchinfer.runner.factory import build_engine
from batchinfer.runner.host import Host
from batchinfer.runner.judged import judged_by
from batchinfer.runner.loop import Loop
from batchinfer.runner.pipeline import Pipeline, Share
from batchinfer.runner.session import Session
from batchinfer.runner.status import InFlight
from batchinfer.runner.width.control import TunedWidth, WidthReport
from batchinfer.runner.width.memory import WidthMemory, kind_of_run
from batchinfer.telemetry import Counters, StartUp, log_event
from batchinfer.verdict import Setup, Verdict

logger = logging.getLogger("batchinfer.runner")

_CLOSE_S = 10.0
_LOOK_S = 0.2


class Pulse(Protocol):
    @property
    def error(self) -> BaseException | None:
        """What ends the run: the output is not ours any more."""

    def now(self) -> None:
        """Show soon how the run stands."""


class Standing(Protocol):
    """Who is told how the computing stands."""

    def engine_ready(self, facts: EngineFacts) -> None: ...

    def admitting(self, admitted: InFlight, setup: Setup | None) -> None: ...

    def tuned(self, report: WidthReport) -> None: ...

    def verdict(self) -> Verdict | None: ...

    def read_meters(self, devices: Sequence[int] | None = None) -> None: ...

    def spent(self) -> dict[str, Any] | None: ...

    def bury_engine(self) -> None: ...

    def write(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Computed:
    """`finished`: totals of the shards that were finished; `is_limited`: `--limit` ended it."""

    finished: Mapping[str, Totals]
    is_limited: bool


def compute(
    session: Session,
    claims: Iterator[Claim],
    host: Host,
    status: Standing,
    heartbeat: Pulse,
    *,
    is_cautious: bool,
    share: Share | None = None,
) -> Computed:
    """Run the engine over what `claims` give out; `share`: of a run that several compute.

    Raises Stopped, EngineDied, InputError and what else ended it, see `Causes`.
    """
    computation = _Computation(session, host, status, heartbeat, share)
    return computation.run(claims, is_cautious=is_cautious)


class _Computation:
    def __init__(
        self,
        session: Session,
        host: Host,
        status: Standing,
        heartbeat: Pulse,
        share: Share | None,
    ) -> None:
        self._session = session
        self._host = host
        self._status = status
        self._heartbeat = heartbeat
        self._share = share
        self._kind = session.start.kind

    def run(self, claims: Iterator[Claim], *, is_cautious: bool) -> Computed:
        pipeline = self._begin(claims)
        importing = _Import(self._kind, self._host.startup)
        engine: Engine | None = None
        error: BaseException | None = None
        try:
            has_work = self._wait_for_work(pipeline, importing)
            self._host.tuning.imported()
            if has_work:
                engine = self._build()
                self._work_off(engine, pipeline, is_cautious=is_cautious)
        except BaseException as caught:  # what is finished is made durable before it goes on
            error = caught
        self._drain(pipeline, error)
        if engine is not None:
            _close(engine)
        end(self._causes(pipeline, error))
        return Computed(pipeline.finished, pipeline.is_limited)

    def _begin(self, claims: Iterator[Claim]) -> Pipeline:
        session, host = self._session, self._host
        host.tuning.begin()
        self._kind.prepare(session.start.spec)
        host.counters.set_max_tokens(session.task.max_tokens)
        host.counters.set_phase("loading the tokenizer")
        host.tuning.importing()
        with host.startup.span("tokenizer"):
            prompter = session.task.prompter(session.job, session.model)
        pipeline = Pipeline(session, claims, prompter, host, self._heartbeat.now, self._share)
        self._heartbeat.now()
        pipeline.start()
        return pipeline

    def _wait_for_work(self, pipeline: Pipeline, importing: _Import) -> bool:
        """Whether there is a row to compute; then the engine is imported too."""
        host = self._host
        host.counters.set_phase("reading input")
        ready = pipeline.ready
        with host.startup.span("first_window"):
            while not (ready.wait(_LOOK_S) or ready.is_exhausted or self._should_stop(pipeline)):
                if importing.is_over:
                    host.tuning.waiting()
        if ready.is_exhausted or self._should_stop(pipeline):
            return False
        host.counters.set_phase("importing the engine")
        importing.join()
        return True

    def _build(self) -> Engine:
        counters = self._host.counters
        counters.set_phase("loading the model")
        with self._host.startup.span("model"), self._kind.phases(counters.set_phase):
            return build_engine(self._kind, self._session.start.spec)

    def _work_off(self, engine: Engine, pipeline: Pipeline, *, is_cautious: bool) -> None:
        host = self._host
        log_event(logger, logging.INFO, "engine_ready", **engine.facts.as_dict())
        self._session.ledger.add_facts(engine=engine.facts.as_dict())
        loop = Loop(
            engine,
            pipeline.ready,
            pipeline.put,
            host.counters,
            job=self._session.job,
            should_stop=lambda: self._should_stop(pipeline),
            is_cautious=is_cautious,
        )
        if self._session.job.engine.tune:
            loop.set_width(self._width(engine, pipeline))
        measure = engine.measure_device if isinstance(engine, MeasurableEngine) else None
        setup = judged_by(self._session.start, engine.facts, measure)
        self._status.engine_ready(engine.facts)
        self._status.admitting(loop, setup)
        if not host.stop.begin_admission():
            return
        host.counters.set_phase("computing")
        loop.admit()
        with contextlib.suppress(TransientError):
            self._status.write()  # names the rows in flight before a step can kill us
        try:
            steps = loop.steps()
            for _ in islice(steps, 1):
                _end_startup(host.startup, engine.facts)
            for _ in steps:
                pass
        finally:
            _log_computed(host.counters)
            self._log_verdict()

    def _width(self, engine: Engine, pipeline: Pipeline) -> TunedWidth:
        """How many sequences run at once is to be found."""
        session = self._session
        kind = kind_of_run(
            engine.facts,
            session.start.identity.model,
            session.job.engine.options,
            task=session.job.task,
            prompt_tokens=pipeline.ready.mean_prompt_tokens(),
            max_tokens=session.task.max_tokens,
        )
        return TunedWidth(engine, WidthMemory(kind), self._host.counters, self._status.tuned)

    def _log_verdict(self) -> None:
        self._status.read_meters()
        if (verdict := self._status.verdict()) is not None:
            logger.info("%s", verdict)
        if (spent := self._status.spent()) is not None:
            logger.info("%s", spent["text"])

    def _should_stop(self, pipeline: Pipeline) -> bool:
        return (
            self._host.stop.is_requested or pipeline.has_failed or self._heartbeat.error is not None
        )

    def _drain(self, pipeline: Pipeline, error: BaseException | None) -> None:
        stop = self._host.stop
        error = self._causes(pipeline, error)._replace(stop=None, input=None).first
        if isinstance(error, EngineDied):
            self._status.bury_engine()
        if error is not None:
            stop.give_up_retrying()
        self._host.counters.set_phase("writing finished rows")
        pipeline.drain(finish_shards=error is None and not stop.is_requested)

    def _causes(self, pipeline: Pipeline, error: BaseException | None) -> Causes:
        return Causes(
            stop=stopped(self._host.stop, pipeline.writer_error),
            writer=pipeline.writer_error,
            reader=pipeline.reader_error,
            lease=self._heartbeat.error,
            engine=error,
            input=bad_input(pipeline.input_errors.values()),
        )


class _Import:
    """The engine's imports, beside the reading of the first rows.

    Not waited for by a start that finds no row to compute.
    """

    def __init__(self, kind: EngineKind, startup: StartUp) -> None:
        self._kind = kind
        self._startup = startup
        self._thread = threading.Thread(target=self._work, name="import", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        try:
            with self._startup.span("engine_imports"):
                self._kind.load()
        except Exception as error:  # `build_engine` imports again, and raises what it finds
            logger.info("importing the engine beforehand failed: %s", error)


def _close(engine: Engine) -> None:
    """A device that hangs must not keep a finished run from saying so."""
    closing = threading.Thread(target=engine.close, name="close", daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    if closing.is_alive():
        logger.warning("the engine did not shut down within %g s", _CLOSE_S)


def _end_startup(startup: StartUp, facts: EngineFacts) -> None:
    """Log where the time went; of the model's, what the engine said about its parts."""
    model_begin_s, model_end_s = startup.spans["model"]
    if warm_up_s := facts.running.warm_up_s:
        startup.add("model", model_begin_s, model_end_s - warm_up_s)
        startup.add("compile_and_warm_up", model_end_s - warm_up_s, model_end_s)
    startup.add("first_step", model_end_s)
    startup.end()
    spans = startup.as_dict()
    log_event(logger, logging.INFO, "started_up", total_s=spans.pop("total_s"), spans=spans)


def _log_computed(counters: Counters) -> None:
    snapshot = counters.snapshot()
    log_event(
        logger,
        logging.INFO,
        "computed",
        rows=snapshot.rows_computed,
        tokens_per_s=round(snapshot.mean_tokens_per_s, 1),
        steps=snapshot.num_steps,
        mean_num_running=round(snapshot.mean_num_running, 1),
        share_of_steps_underfilled=round(snapshot.share_of_steps_underfilled, 4),
        stalled_s=round(snapshot.stalled_s, 3),
    )
