"""The pending shards in pieces: what is given to whom, what came of it, and the finished files of
shards that were given out in pieces.

One thread calls it; folds run in a small pool. Must not know: how replicas are reached. Invariant:
a shard is folded only once each piece of it has ended.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.ledger import Totals, layout
from batchinfer.runner.host import Host
from batchinfer.runner.replicas.dispatch import Dispatch, ShardPiece
from batchinfer.runner.replicas.messages import (
    Durable,
    Give,
    OfPiece,
    PieceEnded,
    PieceFailed,
    Read,
    ShardFinished,
    ShardPlace,
    Started,
)
from batchinfer.runner.session import Session
from batchinfer.source import Shard

logger = logging.getLogger("batchinfer.runner")

_NUM_FOLDERS, _NUM_REMOTE_FOLDERS = 1, 4
_MAX_NAMED = 20


@dataclass(slots=True)
class _Assembly:
    """A shard that was given out in pieces."""

    num_rows: int
    num_rows_ended: int = 0
    expected: Counter[int] = field(default_factory=Counter)  # by window
    schema: bytes = b""


class _FoldAbandonedError(Exception):
    """A fold that gave way to a stop. Nothing appeared; its parts stand."""


class PendingOf(Protocol):
    """What gives out a session's work."""

    def __call__(
        self, session: Session, host: Host, should_stop: Callable[[], bool]
    ) -> PendingShards: ...


class PendingShards:
    """All that is pending in a session."""

    def __init__(self, session: Session, host: Host, should_stop: Callable[[], bool]) -> None:
        self._session = session
        self._host = host
        self._counters = host.counters
        self._should_stop = should_stop
        num_rows = [session.num_rows_of([shard]) for shard in session.pending]
        self.dispatch = self.make_dispatch(num_rows)
        self._assemblies = {index: _Assembly(rows) for index, rows in enumerate(num_rows) if rows}
        num_threads = _NUM_FOLDERS if session.store.is_local else _NUM_REMOTE_FOLDERS
        self._folds = ThreadPoolExecutor(num_threads, thread_name_prefix="fold")
        self._folding: dict[Future[Totals], Shard] = {}
        self._given_up: set[int] = set()  # shards, by index
        self.finished: dict[str, Totals] = {}
        self.input_errors: dict[str, InputError] = {}
        self.error: BaseException | None = None  # ends the run

    def make_dispatch(self, num_rows: Sequence[int]) -> Dispatch:
        session = self._session
        return Dispatch(num_rows, session.window_rows, session.task.num_samples)

    @property
    def is_over(self) -> bool:
        """Everything is done, or given up."""
        return self.dispatch.is_over

    def give(self, replica: int) -> Give | None:
        """Something for a replica that asks; None: nothing now."""
        piece = self.dispatch.take(replica)
        if piece is None:
            return None
        session = self._session
        shard, listed = session.pending[piece.shard], session.survey
        is_finished = shard.name in listed.finished
        if piece.was_lost and piece.is_whole:  # it may have been finished, and the news lost
            is_finished = session.store.stat(shard.name) is not None
        return Give(
            name=piece.name,
            shard=ShardPlace(
                name=shard.name,
                root=shard.store.url,
                key=shard.key,
                size_bytes=shard.size_bytes,
                version=shard.version,
                partitions=shard.partitions,
                outer_partitions=shard.outer_partitions,
            ),
            fingerprint=session.fingerprints[shard.name],
            windows=range(piece.window, piece.window + 1 if piece.num_rows else piece.window),
            rows=(piece.start, piece.stop),
            is_whole=piece.is_whole,
            has_parts=self.may_have_parts(piece),
            is_finished=is_finished,
        )

    def may_have_parts(self, piece: ShardPiece) -> bool:
        shard = self._session.pending[piece.shard]
        return piece.was_lost or shard.name in self._session.survey.with_parts

    def leave_out(self, piece: ShardPiece) -> None:
        """It is taken for what kills, and not given out any more."""

    def hear(self, replica: int, message: OfPiece) -> None:
        """What a replica says of a piece; of a shard that was given up it means nothing."""
        if not self.dispatch.holds(replica, message.name):
            return
        match message:
            case Started():
                self.dispatch.started(replica, message.name)
            case Read():
                self._note_read(replica, message)
            case Durable():
                self.dispatch.durable(replica, message.name, message.num_results)
            case PieceEnded():
                self._assemble(self.dispatch.done(replica, message.name), message)
            case ShardFinished():
                piece = self.dispatch.done(replica, message.name)
                self._note_finished(self._session.pending[piece.shard], message.totals)
            case PieceFailed():
                piece = self.dispatch.done(replica, message.name)
                self._given_up.add(piece.shard)
                name = self._session.pending[piece.shard].name
                self.input_errors[name] = InputError(message.message)
                self.dispatch.give_up(piece.shard)

    def collect(self) -> bool:
        """Take in the folds that have ended; whether there are others."""
        for future in [future for future in self._folding if future.done()]:
            shard = self._folding.pop(future)
            if future.cancelled():
                continue
            match future.exception():
                case None:
                    totals = future.result()
                    self._note_finished(shard, totals)
                    logger.info(
                        "shard finished: %s, %d rows, %d failed",
                        shard.name,
                        totals.rows,
                        totals.rows_failed,
                    )
                case _FoldAbandonedError():
                    pass  # the next start folds
                case InputError() as error:
                    self.input_errors[shard.name] = error
                case error:
                    self.error = self.error or error
        return bool(self._folding)

    def await_folds(self) -> None:
        """Until all have ended, or a stop is asked for."""
        while self.collect() and not self._should_stop():
            time.sleep(0.02)

    def close(self) -> None:
        """Begin no fold any more, and wait for those that have begun."""
        self._folds.shutdown(wait=True, cancel_futures=True)
        self.collect()

    def where(self, piece: ShardPiece) -> str:
        """For people."""
        name = self._session.pending[piece.shard].name
        return f"rows {piece.start} to {piece.stop - 1} of {name} (window {piece.window})"

    def what_kills(self) -> str | None:
        """The message on pieces that were left out; None: there is none."""
        if not (deadly := self.dispatch.deadly):
            return None
        named = ", ".join(self.where(piece) for piece in deadly[:_MAX_NAMED])
        more = f" and {len(deadly) - _MAX_NAMED} more" if len(deadly) > _MAX_NAMED else ""
        logs = self._session.store.url_of(layout.LOGS_PREFIX)
        return (
            f"replicas died again and again with the same rows in their engines: {named}{more}. "
            f"All others are done. Look at {logs} for why; exclude the row with input.filter or "
            "lower engine.max_num_seqs. The next start tries once more"
        )

    def _note_read(self, replica: int, read: Read) -> None:
        piece = self.dispatch.piece(replica, read.name)
        is_first = piece.num_expected is None
        num_new = self.dispatch.read(replica, read.name, read.num_expected, read.num_done)
        if is_first:
            num_rows = piece.num_rows * self._session.task.num_samples
            self._counters.add_read(num_rows, read.num_done, read.num_expected)
        elif num_new:  # durable before the death of who computed them, who could not say so
            self._counters.add_computed(num_new, 0, 0)
            self._counters.add_durable(num_new, 0)

    def _assemble(self, piece: ShardPiece, ended: PieceEnded) -> None:
        """A piece of a shard has ended; with the last one its finished file can be written."""
        assembly = self._assemblies[piece.shard]
        assembly.num_rows_ended += piece.num_rows
        assembly.expected[piece.window] += ended.num_expected
        assembly.schema = ended.schema
        if assembly.num_rows_ended == assembly.num_rows and piece.shard not in self._given_up:
            shard = self._session.pending[piece.shard]
            self._folding[self._folds.submit(self._fold, shard, assembly)] = shard

    def _fold(self, shard: Shard, assembly: _Assembly) -> Totals:
        session = self._session
        num_windows = session.num_windows_of(shard)
        totals = session.ledger.finish_shard(
            shard.name,
            pa.ipc.read_schema(pa.py_buffer(assembly.schema)),
            [assembly.expected[window] for window in range(num_windows)],
            lambda: session.recheck(shard),
            self._keep_folding,
        )
        self._host.tuning.freed()
        return totals

    def _keep_folding(self) -> None:
        if self._should_stop():
            raise _FoldAbandonedError

    def _note_finished(self, shard: Shard, totals: Totals) -> None:
        self.finished[shard.name] = totals
        self._counters.add_shard_finished()
