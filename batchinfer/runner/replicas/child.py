"""The process of a replica, `python -m batchinfer.runner.replicas.child DESCRIPTOR`.

It gets a `ReplicaOrder` and then pieces through the descriptor, and computes them as a run alone
would: the same reader, loop and writer. Must not know: what else there is to compute, who else
does. Invariant: it never outlives its parent, and what it finishes is durable before it says so.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import pyarrow as pa

from batchinfer.config import InputSettings
from batchinfer.engine.base import EngineFacts
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import BatchInferError, InputError
from batchinfer.ledger import Holder, Survey, Totals
from batchinfer.runner.beside import Beside
from batchinfer.runner.claims import Claim
from batchinfer.runner.compute import Computed, compute
from batchinfer.runner.digest import identity_of
from batchinfer.runner.host import Host
from batchinfer.runner.pipeline import Share
from batchinfer.runner.replicas.messages import (
    Beat,
    Durable,
    Ended,
    FromReplica,
    Give,
    HasRoom,
    NoMore,
    PieceEnded,
    PieceFailed,
    Read,
    Ready,
    ReplicaOrder,
    Said,
    ShardFinished,
    ShardPlace,
    Stands,
    Started,
    StopNow,
    Tuned,
)
from batchinfer.runner.session import Session
from batchinfer.runner.shortage import shortages
from batchinfer.runner.start import Start, open_input_folder, open_output
from batchinfer.runner.status import InFlight, verdict_of
from batchinfer.runner.take_over import open_ledger
from batchinfer.runner.tuning import WholeProcess
from batchinfer.runner.width.control import WidthReport, at_width, backlog_of
from batchinfer.signals import end_with, ignore_stops
from batchinfer.source import Fingerprint, RowFilter, Shard
from batchinfer.tasks import task_of
from batchinfer.telemetry import Clock, Counters
from batchinfer.telemetry.logs import LOGGER_NAME, HumanFormatter
from batchinfer.verdict import Setup, Verdict

_BEAT_S = 0.25
#: Names of rows in flight go with every so many beats: those of a run's status are as old.
_NAMES_EVERY = 20


def main(descriptor: str) -> NoReturn:
    """Compute until there is nothing more, and end the process."""
    line = Line(Connection(int(descriptor)))
    order = line.receive()
    assert isinstance(order, ReplicaOrder)
    end_with(order.parent_pid)
    ignore_stops()
    if order.cores:
        os.sched_setaffinity(0, order.cores)
    _log_to(line, order.log_level)
    replica = Replica(order, line)
    last = Ended()
    try:
        with shortages():
            last = Ended(is_limited=replica.run().is_limited)
    except BaseException as error:  # the process's edge
        message = str(error)
        if not isinstance(error, BatchInferError):
            logging.getLogger("batchinfer.runner").debug("in a replica", exc_info=True)
            text = "".join(traceback.format_exception(error))
            message = f"internal error: {text.strip()}"
        last = Ended(type(error).__name__, message)
    replica.end()
    line.send(last)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # its engine's processes end with it


class Line:
    """To and from the parent. Any thread may send; one receives."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromReplica) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(1)  # the parent is gone

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone


class Replica:
    """What the run's own machinery asks for, answered over the line."""

    def __init__(self, order: ReplicaOrder, line: Line) -> None:
        self._order = order
        self._line = line
        self._host = Host(Counters(Clock()), tuning=WholeProcess())
        self._fingerprints: dict[str, Fingerprint] = {}
        self._given: queue.SimpleQueue[Give | NoMore] = queue.SimpleQueue()
        self._admitted: InFlight | None = None
        self._setup: Setup | None = None
        self._report: WidthReport | None = None
        self._is_over = threading.Event()
        self.error: BaseException | None = None  # as a heartbeat has one; the parent checks it

    def run(self) -> Computed:
        threading.Thread(target=self._receive, name="line", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        order = self._order
        self._host.counters.set_total(order.num_rows, 0)
        share = Share(self, order.first_sequence)
        session, claims = self._session(), self._claims()
        return compute(session, claims, self._host, self, self, is_cautious=False, share=share)

    def end(self) -> None:
        """Say once more how it stands."""
        self._is_over.set()
        self._line.send(Beat(self._host.counters.sums(), []))
        self._tell_tally()

    def _tell_tally(self) -> None:
        if self._setup is not None:
            setup = at_width(self._setup, self._report)
            self._line.send(Stands(setup, self._host.counters.tally.so_far()))

    def _session(self) -> Session:
        order, stop = self._order, self._host.stop
        job = order.job
        store = open_output(job, stop.should_give_up)
        start = Start(
            job=job,
            task=task_of(job),
            kind=engine_kind(job.engine.name),
            options=order.options,
            model=order.model,
            identity=identity_of(job, order.model),
            store=store,
            shards=[],
            row_filter=RowFilter(job.input.filter) if job.input.filter else None,
        )
        lease = order.lease.open(store)
        ledger = open_ledger(start, order.digest, order.window_rows, lease, run=order.run)
        ledger.number_after(order.first_sequence)
        ledger.note_inputs(self._fingerprints)
        return Session(
            start=start,
            holder=Holder.current(since=self._host.clock.utc()),
            lease=lease,
            digest=order.digest,
            window_rows=order.window_rows,
            first_run=order.run,
            survey=Survey(),
            beside=Beside(),
            fingerprints=self._fingerprints,
            carried=None
            if order.carried is None
            else pa.ipc.read_schema(pa.py_buffer(order.carried)),
            ledger=ledger,
            pending=[],
            finished={},
            run=order.run,
            written={},
        )

    def _claims(self) -> Iterator[Claim]:
        while True:
            self._line.send(HasRoom())
            given = self._given.get()
            if isinstance(given, NoMore):
                return
            shard = given.shard
            self._fingerprints[shard.name] = given.fingerprint
            yield Claim(
                shard=_shard(shard, self._order.job.input, self._host.stop.should_give_up),
                windows=given.windows,
                rows=given.rows,
                is_whole=given.is_whole,
                has_parts=given.has_parts,
                is_finished=given.is_finished,
                name=given.name,
            )

    def _receive(self) -> None:
        while True:
            message = self._line.receive()
            if isinstance(message, StopNow):
                self._host.stop.request(message.code, message.reason)
                if not self._host.stop.was_admitting:  # there is nothing to flush
                    self._line.send(Ended("Stopped", message.reason))
                    os._exit(0)
                self._given.put(NoMore())
            else:
                self._given.put(message)

    def _beat(self) -> None:
        num_beats = 0
        while not self._is_over.wait(_BEAT_S):
            num_beats += 1
            names = self._names() if num_beats % _NAMES_EVERY == 0 else None
            self._line.send(Beat(self._host.counters.sums(), names))
            if names is not None:
                self._tell_tally()

    def _names(self) -> Sequence[str]:
        return self._admitted.in_flight() if self._admitted is not None else []

    # As a `ClaimWatcher`.

    def started(self, claim: str) -> None:
        self._line.send(Started(claim))

    def read(self, claim: str, num_expected: int, num_done: int) -> None:
        self._line.send(Read(claim, num_expected, num_done))

    def stands(self, claim: str) -> bool:
        return True

    def durable(self, claim: str, num_results: int) -> None:
        self._line.send(Beat(self._host.counters.sums()))  # what is durable is counted as such
        self._line.send(Durable(claim, num_results))

    def ended(self, claim: str, num_expected: int, schema: pa.Schema) -> None:
        self._line.send(PieceEnded(claim, num_expected, schema.serialize().to_pybytes()))

    def finished(self, claim: str, totals: Totals) -> None:
        self._line.send(ShardFinished(claim, totals))

    def failed(self, claim: str, error: InputError) -> None:
        self._line.send(PieceFailed(claim, str(error)))

    # As the `Standing` and the `Pulse` of a computation.

    def admitting(self, admitted: InFlight, setup: Setup | None) -> None:
        self._admitted, self._setup = admitted, setup

    def tuned(self, report: WidthReport) -> None:
        self._report = report
        self._line.send(Tuned(report))

    def verdict(self) -> Verdict | None:
        if self._setup is None:
            return None
        return verdict_of(self._host.counters, at_width(self._setup, self._report))

    def engine_ready(self, facts: EngineFacts) -> None:
        max_in_flight = facts.max_num_seqs + backlog_of(facts.max_num_seqs)
        self._line.send(Ready(replace(facts, extra={}), max_in_flight))

    def read_meters(self, devices: Sequence[int] | None = None) -> None:
        """The parent's: of all replicas together."""

    def spent(self) -> dict[str, Any] | None:
        return None

    def bury_engine(self) -> None: ...

    def write(self) -> None:
        """Before the first step of the engine: what is in flight could kill it."""
        self._line.send(Beat(self._host.counters.sums(), self._names()))

    def now(self) -> None: ...


def _shard(place: ShardPlace, settings: InputSettings, should_stop: Callable[[], bool]) -> Shard:
    return Shard(
        place.name,
        _folder(place.root, settings, should_stop),
        place.key,
        place.size_bytes,
        place.version,
        place.partitions,
        place.outer_partitions,
    )


_folder = cache(open_input_folder)


def _log_to(line: Line, level: int) -> None:
    """Our records go to the parent, those of libraries to stderr, as in a run alone to its log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HumanFormatter(is_file=True))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    ours = logging.getLogger(LOGGER_NAME)
    ours.setLevel(level)
    ours.propagate = False
    ours.addHandler(_Sender(line))


class _Sender(logging.Handler):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", None)
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        self._line.send(Said(record.name, record.levelno, text, fields or {}))


if __name__ == "__main__":
    main(sys.argv[1])
