"""The pieces of a member for the replicas of its process: leased as they ask, split among them.

Must not know: stores, leases' content, how replicas are reached. Invariant: a leased piece ends
once each part of it that a replica was given has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchinfer.errors import BatchInferError
from batchinfer.ledger import Totals
from batchinfer.runner.host import Host
from batchinfer.runner.joined.alone import WAITING
from batchinfer.runner.joined.joint import Held, Joint
from batchinfer.runner.replicas.dispatch import Dispatch, ShardPiece
from batchinfer.runner.replicas.messages import Give, OfPiece, PieceEnded, PieceFailed
from batchinfer.runner.replicas.pending import PendingShards
from batchinfer.runner.session import Session
from batchinfer.source import Shard


@dataclass(slots=True)
class _Lent:
    """A leased piece that was given out, perhaps to several replicas."""

    held: Held
    num_rows_ended: int = 0
    num_expected: int = 0


class JoinedShards(PendingShards):
    """As its base, of what this member leases. Closed once the others have finished the rest."""

    def __init__(
        self, session: Session, host: Host, should_stop: Callable[[], bool], joint: Joint
    ) -> None:
        super().__init__(session, host, should_stop)
        self._joint = joint
        self._index = {shard.name: index for index, shard in enumerate(session.pending)}
        self._lent: dict[int, list[_Lent]] = {}  # by shard, those that have not ended

    def make_dispatch(self, num_rows: Sequence[int]) -> Dispatch:
        session = self._session
        return Dispatch(num_rows, session.window_rows, session.task.num_samples, is_fed=True)

    @property
    def is_over(self) -> bool:
        return self.dispatch.is_over and self._joint.is_over

    def give(self, replica: int) -> Give | None:
        window_rows, dispatch = self._session.window_rows, self.dispatch
        dispatch.num_rows_outside = self._joint.num_rows_fair(0, 4 * window_rows)
        given = super().give(replica)
        while given is None and not dispatch.has_waiting and dispatch.has_room(replica):
            if (held := self._joint.take()) is None:
                break
            piece = held.piece
            shard = self._index[piece.shard]
            self._lent.setdefault(shard, []).append(_Lent(held))
            dispatch.add(shard, piece.rows.start, piece.rows.stop)
            given = super().give(replica)
        self._tell_phase(is_waiting=given is None and dispatch.is_over)
        return given

    def _tell_phase(self, *, is_waiting: bool) -> None:
        counters = self._host.counters
        if is_waiting:
            counters.set_phase(WAITING)
        elif counters.phase == WAITING:
            counters.set_phase("computing")

    def may_have_parts(self, piece: ShardPiece) -> bool:
        lent = self._lent_of(piece)
        return super().may_have_parts(piece) or (lent is not None and lent.held.was_begun)

    def hear(self, replica: int, message: OfPiece) -> None:
        if isinstance(message, PieceFailed) and self.dispatch.holds(replica, message.name):
            piece = self.dispatch.piece(replica, message.name)
            self._joint.give_up(self._session.pending[piece.shard].name)
        super().hear(replica, message)

    def leave_out(self, piece: ShardPiece) -> None:
        self._joint.give_up(self._session.pending[piece.shard].name)

    def collect(self) -> bool:
        try:
            self._joint.check()
        except BatchInferError as error:
            self.error = self.error or error
        return super().collect()

    def _assemble(self, piece: ShardPiece, ended: PieceEnded) -> None:
        lent = self._lent_of(piece)
        assert lent is not None
        if lent.held.piece.is_whole:
            super()._assemble(piece, ended)
            return
        lent.num_rows_ended += piece.num_rows
        lent.num_expected += ended.num_expected
        if lent.num_rows_ended == len(lent.held.piece.rows):
            self._lent[piece.shard].remove(lent)
            self._joint.read(lent.held, lent.num_expected)
            self._joint.ended(lent.held, lent.num_expected)

    def _lent_of(self, piece: ShardPiece) -> _Lent | None:
        for lent in self._lent.get(piece.shard, ()):
            rows = lent.held.piece.rows
            if rows.start <= piece.start and piece.stop <= rows.stop:
                return lent
        return None

    def _note_finished(self, shard: Shard, totals: Totals) -> None:
        super()._note_finished(shard, totals)
        for lent in self._lent.pop(self._index[shard.name], ()):
            self._joint.read(lent.held, totals.rows)
        self._joint.finished(shard.name, totals)
