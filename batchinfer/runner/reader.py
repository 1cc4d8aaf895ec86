"""The reader: pending shards -> chunks of tokenized, ordered rows that are not done yet.

Runs in its own threads (one locally, several where a request to storage takes long), ahead of the
engine and bounded by `ReadyWork`. Must not know: engines. Invariant: every row that passes the
filter is either done already, put into one chunk, or reported as an error result; `window_read`
says how many there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.config import Job
from batchinfer.engine.base import Completion
from batchinfer.errors import InputError, RowError
from batchinfer.ledger import Keys, Ledger, PartId, Survey
from batchinfer.plan import Chunk
from batchinfer.prompt import Prepared, RowPrompter, joined_counts
from batchinfer.runner.carried import Carrier
from batchinfer.runner.ids import IdWarnings
from batchinfer.runner.ready import MAX_CARRIED_BYTES, ReadyWork
from batchinfer.runner.remarks import RemarkWarnings
from batchinfer.runner.writer import ShardOutput, Writer
from batchinfer.sink import output_schema
from batchinfer.source import Block, RowFilter, Shard, ShardReader, plain_column
from batchinfer.tasks import Result, task_of
from batchinfer.telemetry import Clock, Counters

logger = logging.getLogger("batchinfer.runner")

_BLOCK_BYTES = 4 << 20


@dataclass(slots=True)
class _Pending:
    """Rows of a chunk under construction."""

    rows: list[npt.NDArray[np.int64]] = field(default_factory=list)
    todo: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    carried: list[pa.Table] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0


class Reader:
    """Feeds `ready` and `writer` from `shards`.

    `join` after the end; errors are in `error`, `input_errors`.
    """

    def __init__(
        self,
        job: Job,
        shards: Sequence[Shard],
        *,
        survey: Survey,
        ledger: Ledger,
        prompter: RowPrompter,
        row_filter: RowFilter | None,
        carried: pa.Schema | None,
        ready: ReadyWork,
        writer: Writer,
        counters: Counters,
        clock: Clock,
        window_rows: int,
        limit: int | None,
        retry_failed: bool,
        recheck: Callable[[Shard], None],
        check_content: Callable[[Shard, str], None],
        num_threads: int,
    ) -> None:
        self._job = job
        self._shards = iter(shards)
        self._survey = survey
        self._ledger = ledger
        self._prompter = prompter
        self._filter = row_filter
        self._carrier = Carrier(job, carried)
        self._ready = ready
        self._writer = writer
        self._counters = counters
        self._clock = clock
        self._window_rows = window_rows
        self._num_rows_left = limit
        self._is_cut = False  # whether rows were left out because of it
        self._retry_failed = retry_failed
        self._recheck = recheck
        self._check_content = check_content
        self._task = task_of(job)
        self._num_samples = self._task.num_samples
        id_column = job.input.id_column
        self._id_warnings = IdWarnings(id_column) if id_column else None
        self._remark_warnings = RemarkWarnings()
        self._num_shortened = 0  # prompts that were shortened to fit
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"reader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        self._num_running = num_threads
        self._is_stopped = False
        self.error: BaseException | None = None  # ends the run
        self.input_errors: dict[
            str, InputError
        ] = {}  # shards that cannot be read; the others go on

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Read no further. Returns at once."""
        self._is_stopped = True
        self._ready.close()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for all threads together; one that is stuck in a request is left behind."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            thread.join(left_s)

    def warn_of_shortened(self) -> None:
        """Say how many prompts of this run were cut, as `prompt.on_too_long` asks for."""
        if self._num_shortened:
            logger.warning(
                "%d prompts of this run were cut to fit max_model_len less sampling.max_tokens "
                "(prompt.on_too_long: %s)",
                self._num_shortened,
                self._job.prompt.on_too_long,
            )

    @property
    def is_limited(self) -> bool:
        """Whether `limit` ended the reading before the input did."""
        return self._is_cut

    def _run(self) -> None:
        try:
            while not self._is_stopped and not self.is_limited:
                with self._lock:
                    shard = next(self._shards, None)
                if shard is None:
                    break
                try:
                    self._read_shard(shard)
                except InputError as error:
                    logger.error("%s", error)
                    self.input_errors[shard.name] = error
        except BaseException as error:  # the thread's edge: the main thread raises it
            self.error = self.error or error
            self._is_stopped = True
        finally:
            with self._lock:
                self._num_running -= 1
                if self._num_running == 0 or self.error is not None:
                    self._ready.close()

    def _read_shard(self, shard: Shard) -> None:
        is_finished = shard.name in self._survey.finished
        with ShardReader(
            shard, self._columns(), self._filter, max_block_bytes=_BLOCK_BYTES
        ) as reader:
            self._check_content(shard, reader.footer_sha256)
            schema = output_schema(self._carrier.fields(reader.schema), self._task.columns)
            parts = (
                self._ledger.parts_of(shard.name) if shard.name in self._survey.with_parts else []
            )
            self._writer.open_shard(
                ShardOutput(
                    shard.name, schema, lambda: self._recheck(shard), bool(parts) or is_finished
                )
            )
            finished = self._ledger.keys_of_finished(shard.name) if is_finished else None
            parts_of_window = {w: list(ps) for w, ps in groupby(parts, key=lambda p: p.window)}
            for window in range(-(-reader.num_rows // self._window_rows)):
                num_rows = min(self._window_rows, reader.num_rows - window * self._window_rows)
                of_window = parts_of_window.get(window, [])
                is_done = self._done(shard, window, num_rows, of_window, finished)
                if not self._read_window(shard, reader, window, is_done):
                    return  # stopped, or the limit is reached: the shard stays unfinished
        self._writer.shard_read(shard.name)

    def _columns(self) -> list[str]:
        job = self._job
        id_column = [job.input.id_column] if job.input.id_column else []
        return list(dict.fromkeys([*self._prompter.columns, *id_column, *job.input.keep_columns]))

    def _done(
        self,
        shard: Shard,
        window: int,
        num_rows: int,
        parts: Sequence[PartId],
        finished: Keys | None,
    ) -> npt.NDArray[np.bool_]:
        """[num_rows, num_samples]: what needs no computing, read from the results themselves."""
        is_done = np.zeros((num_rows, self._num_samples), dtype=np.bool_)
        start = window * self._window_rows
        sources = [self._ledger.keys_of_parts(shard.name, parts)] if parts else []
        if finished is not None:
            low, high = np.searchsorted(finished.row, [start, start + num_rows])
            sources.append(finished.slice(low, high))
        for keys in sources:
            wanted = (
                ~keys.is_error if self._retry_failed else np.ones(len(keys.row), dtype=np.bool_)
            )
            is_done[keys.row[wanted] - start, keys.sample[wanted]] = True
        return is_done

    def _read_window(
        self, shard: Shard, reader: ShardReader, window: int, is_done: npt.NDArray[np.bool_]
    ) -> bool:
        """Read one window and hand out its rows. False if the rest is not to be read."""
        num_rows = len(is_done)
        start = window * self._window_rows
        stop = start + num_rows
        if self._filter is None and is_done.all():
            self._counters.add_read(is_done.size, is_done.size)
            self._writer.window_read(shard.name, window, is_done.size, is_done.size)
            return True
        num_expected = num_done = 0
        pending = _Pending()
        for block in reader.blocks(start, stop):
            if self._is_stopped:
                return False
            done = is_done[block.rows - start]
            num_expected += done.size
            num_done += int(done.sum())
            indices = np.flatnonzero(~done.all(axis=1))
            if self._num_rows_left is not None:
                indices = self._within_limit(indices)
            if len(indices):
                if len(indices) < len(block.rows):
                    block = block.take(indices)
                self._add(pending, shard, block, ~done[indices])
            if (
                pending.num_tokens >= self._job.packing.buffer_tokens
                or pending.num_bytes >= MAX_CARRIED_BYTES
            ):
                if not self._emit(shard, window, pending):
                    return False
                pending = _Pending()
            if self.is_limited:
                self._emit(shard, window, pending)
                return False
        if pending.rows and not self._emit(shard, window, pending):
            return False
        self._counters.add_read(num_rows * self._num_samples, num_done, num_expected)
        self._writer.window_read(shard.name, window, num_expected, num_done)
        return True

    def _within_limit(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        with self._lock:
            assert self._num_rows_left is not None
            self._is_cut |= len(indices) > self._num_rows_left
            indices = indices[: self._num_rows_left]
            self._num_rows_left -= len(indices)
            return indices

    def _add(
        self,
        pending: _Pending,
        shard: Shard,
        block: Block,
        todo: npt.NDArray[np.bool_],
    ) -> None:
        prepared = self._prompter.prepare(block.table)
        self._remark_warnings.check(shard.name, block.rows, prepared.remarks)
        with self._lock:
            self._num_shortened += prepared.num_cut
        carried = self._carrier.table(shard, block)
        pending.rows.append(block.rows)
        pending.todo.append(todo)
        pending.prepared.append(prepared)
        pending.carried.append(carried)
        pending.num_tokens += len(prepared.token_ids)
        pending.num_bytes += carried.nbytes

    def _emit(self, shard: Shard, window: int, pending: _Pending) -> bool:
        if not pending.rows:
            return True
        chunk = _chunk(self._job, shard.name, window, pending)
        if self._id_warnings is not None:
            self._id_warnings.check(
                shard.name, chunk.rows, plain_column(chunk.carried.column("id"))
            )
        errors = list(_error_results(chunk, self._clock.wall_us()))
        if errors:
            self._writer.put(errors)
            self._counters.add_computed(len(errors), 0, 0)
        return self._ready.put(chunk)


def _chunk(job: Job, shard: str, window: int, pending: _Pending) -> Chunk:
    errors: dict[int, RowError] = {}
    offsets = [np.zeros(1, np.int64)]
    token_ids = np.empty(pending.num_tokens, np.int32)
    num_rows = num_tokens = 0
    num_given = joined_counts([prepared.num_given for prepared in pending.prepared])
    num_bytes = joined_counts([prepared.num_text_bytes for prepared in pending.prepared])
    pieces, pending.prepared = pending.prepared[::-1], []
    while pieces:  # each is freed once it is copied: all of them twice would be too much
        prepared = pieces.pop()
        errors |= {num_rows + index: error for index, error in prepared.errors.items()}
        offsets.append(prepared.offsets[1:] + num_tokens)
        token_ids[num_tokens : num_tokens + len(prepared.token_ids)] = prepared.token_ids
        num_rows += len(prepared.offsets) - 1
        num_tokens += len(prepared.token_ids)
    return Chunk(
        shard=shard,
        window=window,
        rows=np.concatenate(pending.rows),
        token_ids=token_ids,
        offsets=np.concatenate(offsets),
        carried=pa.concat_tables(pending.carried).combine_chunks(),  # parts take rows of it
        errors=errors,
        is_todo=np.concatenate(pending.todo),
        deduplicate=job.packing.deduplicate and task_of(job).is_repeatable,
        num_given=num_given,
        num_text_bytes=num_bytes,
    )


def _error_results(chunk: Chunk, finished_at_us: int) -> Iterator[Result]:
    for index, error in chunk.errors.items():
        for sample in np.flatnonzero(chunk.is_todo[index]).tolist():
            completion = Completion(key=-1, error_type=error.kind, error_message=error.message)
            yield Result(chunk, index, sample, completion, finished_at_us)
