"""The reader: claimed windows -> chunks of tokenized, ordered rows that are not done yet.

Runs in its own threads (one locally, several where a request to storage takes long), ahead of the
engine and bounded by `ReadyWork`. Must not know: engines. Invariant: every row that passes the
filter is either done already, put into one chunk, or reported as an error result; `window_read`
says how many there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from batchinfer.errors import InputError
from batchinfer.ledger import Keys, PartId
from batchinfer.prompt import RowPrompter
from batchinfer.runner.carried import Carrier
from batchinfer.runner.chunking import Gathered, build_chunk, error_results
from batchinfer.runner.claims import Claim, ClaimWatcher, Unwatched
from batchinfer.runner.host import Host
from batchinfer.runner.ids import IdWarnings
from batchinfer.runner.ready import MAX_CARRIED_BYTES, ReadyWork
from batchinfer.runner.remarks import RemarkWarnings
from batchinfer.runner.session import Session
from batchinfer.runner.shard_progress import progress_of
from batchinfer.runner.shown import ShownPrompts
from batchinfer.runner.writer import Writer
from batchinfer.sink import output_schema
from batchinfer.source import Block, Shard, ShardReader, plain_column

logger = logging.getLogger("batchinfer.runner")

_BLOCK_BYTES = 4 << 20
_REMOTE_READERS = 4


class Reader:
    """Feeds `ready` and `writer` from claims.

    `join` after the end; errors are in `error`, `input_errors`.
    """

    def __init__(
        self,
        session: Session,
        claims: Iterator[Claim],
        prompter: RowPrompter,
        ready: ReadyWork,
        writer: Writer,
        host: Host,
        watcher: ClaimWatcher | None = None,
    ) -> None:
        """`claims`: what to read, asked for one at a time; whoever gives them out may wait."""
        job = session.job
        self._session = session
        self._job = job
        self._claims = claims
        self._watcher: ClaimWatcher = watcher or Unwatched()
        self._prompter = prompter
        self._carrier = Carrier(job, session.carried)
        self._ready = ready
        self._writer = writer
        self._counters = host.counters
        self._clock = host.clock
        self._num_rows_left = session.options.limit
        self._is_cut = False  # whether rows were left out because of it
        self._task = session.task
        self._num_samples = self._task.num_samples
        num_threads = 1 if session.is_input_local else _REMOTE_READERS
        id_column = job.input.id_column
        self._id_warnings = IdWarnings(id_column) if id_column else None
        self._remark_warnings = RemarkWarnings()
        self._shown_prompts = ShownPrompts(prompter)
        self._num_shortened = 0  # prompts that were shortened to fit
        self._lock = threading.Lock()
        self._claiming = threading.Lock()  # may be held for long: who gives out claims may wait
        self._threads = [
            threading.Thread(target=self._run, name=f"reader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        self._num_running = num_threads
        self._is_stopped = False
        self.error: BaseException | None = None  # ends the run
        self.input_errors: dict[
            str, InputError
        ] = {}  # shards that cannot be read; the others continue

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Read no further. Returns immediately."""
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
                "%d prompts of this run were cut to fit %s (prompt.on_too_long: %s)",
                self._num_shortened,
                self._prompter.limit.room,
                self._job.prompt.on_too_long,
            )

    @property
    def is_limited(self) -> bool:
        """Whether `limit` ended the reading before the input did."""
        return self._is_cut

    def _run(self) -> None:
        try:
            while not self._is_stopped and not self.is_limited:
                with self._claiming:
                    claim = next(self._claims, None)
                if claim is None:
                    break
                try:
                    self._read(claim)
                except InputError as error:
                    logger.error("%s", error)
                    self.input_errors[claim.shard.name] = error
                    self._watcher.failed(claim.name, error)
        except BaseException as error:  # the thread's edge: the main thread raises it
            self.error = self.error or error
            self._is_stopped = True
        finally:
            with self._lock:
                self._num_running -= 1
                if self._num_running == 0 or self.error is not None:
                    self._ready.close()

    def _read(self, claim: Claim) -> None:
        session, shard = self._session, claim.shard
        ledger = session.ledger
        with ShardReader(
            shard, self._columns(), session.row_filter, max_block_bytes=_BLOCK_BYTES
        ) as reader:
            session.check_content(shard, reader.footer_sha256)
            schema = output_schema(self._carrier.fields(reader.schema), self._task.columns)
            self._writer.open_shard(progress_of(session, claim, schema))
            parts = ledger.parts_of(shard.name) if claim.has_parts else []
            finished = ledger.keys_of_finished(shard.name) if claim.is_finished else None
            parts_of_window = {w: list(ps) for w, ps in groupby(parts, key=lambda p: p.window)}
            for window in claim.windows:
                start = window * session.window_rows
                stop = min(start + session.window_rows, reader.num_rows)
                if claim.rows is not None:
                    start, stop = max(start, claim.rows[0]), min(stop, claim.rows[1])
                of_window = parts_of_window.get(window, [])
                is_done = self._done(shard, range(start, stop), of_window, finished)
                if not self._read_window(claim, reader, window, start, is_done):
                    return  # stopped, or the limit is reached: the shard stays unfinished

    def _columns(self) -> list[str]:
        job = self._job
        id_column = [job.input.id_column] if job.input.id_column else []
        return list(dict.fromkeys([*self._prompter.columns, *id_column, *job.input.keep_columns]))

    def _done(
        self,
        shard: Shard,
        rows: range,
        parts: Sequence[PartId],
        finished: Keys | None,
    ) -> npt.NDArray[np.bool_]:
        """[len(rows), num_samples]: what needs no computing, read from the results themselves."""
        is_done = np.zeros((len(rows), self._num_samples), dtype=np.bool_)
        sources = [self._session.ledger.keys_of_parts(shard.name, parts)] if parts else []
        if finished is not None:
            low, high = np.searchsorted(finished.row, [rows.start, rows.stop])
            sources.append(finished.slice(low, high))
        for keys in sources:
            wanted = (keys.row >= rows.start) & (keys.row < rows.stop)  # a part may have others
            if self._session.options.retry_failed:
                wanted &= ~keys.is_error
            is_done[keys.row[wanted] - rows.start, keys.sample[wanted]] = True
        return is_done

    def _read_window(
        self,
        claim: Claim,
        reader: ShardReader,
        window: int,
        start: int,
        is_done: npt.NDArray[np.bool_],
    ) -> bool:
        """Read a window from the row `start` on, and hand out its rows. False if the rest is not to
        be read.
        """
        shard, num_rows = claim.shard, len(is_done)
        stop = start + num_rows
        if self._session.row_filter is None and is_done.all():
            self._say_read(claim, window, num_rows, is_done.size, is_done.size)
            return True
        num_expected = num_done = 0
        gathered = Gathered()
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
                self._add(gathered, shard, block, ~done[indices])
            if (
                gathered.num_tokens >= self._job.packing.buffer_tokens
                or gathered.num_bytes >= MAX_CARRIED_BYTES
            ):
                if not self._emit(claim, window, gathered):
                    return False
                gathered = Gathered()
            if self.is_limited:
                self._emit(claim, window, gathered)
                return False
        if gathered.rows and not self._emit(claim, window, gathered):
            return False
        self._say_read(claim, window, num_rows, num_expected, num_done)
        return True

    def _say_read(
        self, claim: Claim, window: int, num_rows: int, num_expected: int, num_done: int
    ) -> None:
        self._counters.add_read(num_rows * self._num_samples, num_done, num_expected)
        self._watcher.read(claim.name, num_expected, num_done)
        self._writer.window_read(claim.name or claim.shard.name, window, num_expected, num_done)

    def _within_limit(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        with self._lock:
            assert self._num_rows_left is not None
            self._is_cut |= len(indices) > self._num_rows_left
            indices = indices[: self._num_rows_left]
            self._num_rows_left -= len(indices)
            return indices

    def _add(
        self,
        gathered: Gathered,
        shard: Shard,
        block: Block,
        todo: npt.NDArray[np.bool_],
    ) -> None:
        prepared = self._prompter.prepare(block.table)
        self._remark_warnings.check(shard.name, block.rows, prepared.remarks)
        self._shown_prompts.show(shard.name, block.rows, prepared)
        with self._lock:
            self._num_shortened += prepared.num_cut
        carried = self._carrier.table(shard, block)
        gathered.add(block.rows, todo, prepared, carried)

    def _emit(self, claim: Claim, window: int, gathered: Gathered) -> bool:
        if not gathered.rows:
            return True
        chunk = build_chunk(self._job, claim, window, gathered)
        if self._id_warnings is not None:
            self._id_warnings.check(
                chunk.shard, chunk.rows, plain_column(chunk.carried.column("id"))
            )
        errors = list(error_results(chunk, self._clock.wall_us()))
        if errors:
            self._writer.put(errors)
            self._counters.add_computed(len(errors), 0, 0)
        return self._ready.put(chunk)
