"""The loop: admit, step, route what finished. It drives the engine and nothing else.

The engine is kept full across batches, windows and shards: draining it between batches costs 2.0x
to 2.6x with skewed output lengths. Must not know: files, Parquet. Runs in the main thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from batchinfer.config import Job
from batchinfer.engine.base import Answer, Engine, Request
from batchinfer.errors import RowError
from batchinfer.plan import WorkItem
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.steps import StepCounts
from batchinfer.runner.width.control import Width
from batchinfer.tasks import Ask, Result, RowWork, task_of
from batchinfer.telemetry import Counters

logger = logging.getLogger("batchinfer.runner")

_IDLE_WAIT_S = 0.2
_NUM_SHOWN = 3  # with --debug
#: In flight after a run that died without a durable row, until the first is durable. A row that
#: kills is then one of few that are named, and a run that is killed again soon has got a little
#: further.
MAX_CAUTIOUS = 8


def _described(item: WorkItem, request: Request) -> str:
    """For --debug: whose it is and what is asked."""
    row = int(item.chunk.rows[item.index])
    return f"{item.chunk.shard}:{row}, sample {item.sample}, {request}"


class _Row:
    """A (row, sample) that the engine has, or has in part: a task may ask for it several times."""

    __slots__ = ("_asks", "ask", "error", "item", "num_in_flight", "work")

    def __init__(self, item: WorkItem, work: RowWork) -> None:
        self.item = item
        self.work = work
        self._asks = work.asks()
        self.ask = next(self._asks, None)  # the next to be admitted
        self.num_in_flight = 0
        self.error: Answer | None = None  # the first; the row's, whatever else comes

    def next_ask(self) -> Ask:
        ask = self.ask
        assert ask is not None
        self.ask = next(self._asks, None)
        self.num_in_flight += 1
        return ask

    def add(self, ask: Ask, answer: Answer) -> None:
        """After an error nothing more is asked for the row, and what is on its way is dropped."""
        self.num_in_flight -= 1
        if self.error is not None:
            return
        if answer.error_type is None:
            try:
                self.work.add(ask, answer)
            except RowError as error:
                answer = Answer(answer.key, error_type=error.kind, error_message=error.message)
        if answer.error_type is not None:
            self.error, self.ask = answer, None

    @property
    def is_complete(self) -> bool:
        return self.num_in_flight == 0 and self.ask is None


class Loop:
    """Admits rows and steps the engine until the work is exhausted or `should_stop` says so."""

    def __init__(
        self,
        engine: Engine,
        ready: ReadyWork,
        emit: Callable[[list[Result]], None],
        counters: Counters,
        *,
        job: Job,
        should_stop: Callable[[], bool],
        is_cautious: bool = False,
    ) -> None:
        """`is_cautious`: begin with few rows in flight, until the first are durable."""
        self._engine = engine
        self._ready = ready
        self._emit = emit
        self._counters = counters
        self._clock = counters.clock
        self._should_stop = should_stop
        self._task = task_of(job)
        self._width = Width(engine)
        self._is_cautious = is_cautious
        self._max_admitted = job.packing.batch_rows
        self._steps = StepCounts(engine, counters)
        self._next_key = 0
        self._in_flight: dict[int, tuple[_Row, Ask]] = {}
        self._row: _Row | None = None  # whose requests are being admitted

    def set_width(self, width: Width) -> None:
        """How many sequences run at once. Before the first row is admitted."""
        self._width = width
        self._steps.set_width(width.now)

    def in_flight(self, max_rows: int = 10_000) -> list[str]:
        """What the engine has at the moment, as "shard:row", oldest first.

        May be called from any thread.
        """
        items = [row.item for row, _ in list(self._in_flight.values())[:max_rows]]
        return list(dict.fromkeys(f"{i.chunk.shard}:{int(i.chunk.rows[i.index])}" for i in items))

    def admit(self) -> None:
        """Admit a batch: what is ready and fits.

        A request the engine refuses is a result immediately.
        """
        room = self._room()
        planned_s = self._ready.planned_s
        for _ in range(min(room, self._max_admitted)):
            row = self._row or self._next_row()
            if row is None:
                break
            self._admit(row)
        self._steps.add_stall(self._ready.planned_s - planned_s)
        self._counters.set_in_flight(len(self._in_flight))

    def _next_row(self) -> _Row | None:
        while (item := self._ready.take()) is not None:
            row = _Row(item, self._task.work(item, self._engine.facts.max_model_len))
            if row.ask is not None:
                return row
            self._finish([row])
        return None

    def _admit(self, row: _Row) -> None:
        """The next request of a row."""
        self._steps.admitting()
        key, self._next_key = self._next_key, self._next_key + 1
        ask = row.next_ask()
        self._row = row if row.ask is not None else None
        self._in_flight[key] = (row, ask)
        request = ask.request(key)
        if key < _NUM_SHOWN:
            logger.debug("request %d: %s", key, _described(row.item, request))
        try:
            self._engine.add(request)
        except RowError as error:
            self._route([Answer(key, error_type=error.kind, error_message=error.message)])

    def _room(self) -> int:
        if self._is_cautious:
            if self._counters.rows_durable == 0:
                return max(0, MAX_CAUTIOUS - len(self._in_flight))
            self._is_cautious = False
        return self._width.max_in_flight - len(self._in_flight)

    def run(self) -> None:
        """Until nothing is left to do. Raises EngineDied."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """Admit, step, route, until nothing is left to do. Yields after each step of the engine."""
        while not self._should_stop():
            self.admit()
            if self._in_flight:
                self._step()
                yield
            elif self._row is not None:
                continue  # its last requests were refused
            elif self._ready.is_exhausted:
                return
            else:
                with self._steps.stall():
                    self._ready.wait(_IDLE_WAIT_S)

    def _step(self) -> None:
        self._steps.stepping()
        num_given = len(self._in_flight)
        answers = self._engine.step()
        is_held = self._is_cautious or self._width.is_searching
        step = self._steps.stepped(num_given, is_held=is_held)
        if not self._is_cautious:
            self._width.stepped(step)
            self._steps.set_width(self._width.now)
        self._route(answers)
        self._steps.count_tokens()

    def _route(self, answers: Sequence[Answer]) -> None:
        """Give answers to their rows, and finish those that wait for no more."""
        complete = []
        for answer in answers:
            row, ask = self._in_flight.pop(answer.key)
            self._steps.answered(len(ask.token_ids), answer)
            if answer.error_type is None:
                self._width.answered(answer.tokens()[1])
            row.add(ask, answer)
            if row is self._row and row.ask is None:
                self._row = None
            if row.is_complete:
                complete.append(row)
        self._finish(complete)

    def _finish(self, rows: list[_Row]) -> None:
        if not rows:
            return
        finished_at_us = self._clock.wall_us()
        results = []
        num_tokens = 0
        for row in rows:
            answer = row.error or row.work.answer()
            chunk, index, sample = row.item.chunk, row.item.index, row.item.sample
            num_tokens += self._task.num_tokens(answer, chunk.num_prompt_tokens(index))
            results.append(Result(chunk, index, sample, answer, finished_at_us))
            leader_row = int(chunk.rows[index])
            results.extend(
                Result(chunk, follower, sample, answer, finished_at_us, duplicate_of=leader_row)
                for follower in chunk.followers.get(index, ())
            )
        self._counters.add_computed(
            len(results),
            sum(r.chunk.num_prompt_tokens(r.index) for r in results if r.duplicate_of is None),
            num_tokens,
        )
        self._counters.set_in_flight(len(self._in_flight))
        with self._steps.stall():
            self._emit(results)
