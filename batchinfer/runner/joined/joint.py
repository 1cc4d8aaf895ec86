"""One member of a joined run: which pieces it leases, and what becomes of them and their shards.

Its own thread looks at the store, says which pieces have ended, and has shards finished; whoever
computes asks for pieces from another. Must not know: engines, how rows are computed. Invariant:
what is done is said by parts and finished files alone; leases keep members apart.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from batchinfer.errors import InputError
from batchinfer.ledger import IncompleteShard, Totals
from batchinfer.ledger.members import MemberLease, Members
from batchinfer.ledger.piece_leases import FOLD, PieceLeases, ShardLeases, Taken
from batchinfer.runner.host import Host
from batchinfer.runner.joined.board import Board, Piece
from batchinfer.runner.joined.folds import Folds
from batchinfer.runner.joined.seen import Seen
from batchinfer.runner.session import Session

logger = logging.getLogger("batchinfer.runner")

#: Between looks at the store while there is nothing to take, and while there is.
_HUNGRY_S, _REMOTE_HUNGRY_S = 0.5, 2.0
_FED_S = 10.0
_WAIT_S = 0.1
_GOLDEN = 0.618034  # its multiples are spread over [0, 1)


@dataclass(slots=True, eq=False)
class Held:
    """A piece that we have, or had."""

    piece: Piece
    number: int  # of its lease
    num_lapses: int  # of the member, when it was last known to be ours
    is_lost: bool = False

    @property
    def was_begun(self) -> bool:
        """Whether somebody else had it before, who may have left parts."""
        return self.number > 1


class Joint:
    """`take` and `stands` may be called from any threads, one at a time each."""

    def __init__(self, session: Session, host: Host) -> None:
        lease = session.lease
        assert isinstance(lease, MemberLease)
        self._session = session
        self._host = host
        self._lease = lease
        self._leases = PieceLeases(session.store, lease.member)
        self._members = Members(session.store)
        self._shards = {shard.name: shard for shard in session.pending}
        num_rows = {s.name: session.fingerprints[s.name].num_rows for s in session.pending}
        place = lease.member.number * _GOLDEN % 1
        self._board = Board(num_rows, session.window_rows, place)
        self._seen = Seen(num_rows, session.task.num_samples, host.counters)
        self._folds = Folds(session, host)
        self._lock = threading.Lock()  # of the board and what follows
        self._freed: list[tuple[Piece, Taken]] = []  # pieces of members that are gone
        self._is_hungry = False  # nothing is known that could be taken
        self._ended: queue.SimpleQueue[tuple[Piece, int]] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="joint", daemon=True)
        self._error: BaseException | None = None
        self.totals: dict[str, Totals] = {}  # of the shards that this member has finished

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Say what has ended, and wait for folds, which a stop ends. Raises what was in the way."""
        self._is_closed = True
        self._thread.join()
        self._folds.close()
        self._collect()
        self.check()

    def check(self) -> None:
        """Raise what ended its own thread."""
        if self._error is not None:
            raise self._error

    @property
    def input_errors(self) -> Iterable[InputError]:
        return self._folds.input_errors.values()

    @property
    def is_over(self) -> bool:
        """Every shard is finished, by whomever, or cannot be read."""
        with self._lock:
            return self._board.is_over

    def num_rows_fair(self, num_open: int, at_most: int) -> float:
        """Our share of what nobody has, and of our own `num_open` rows; at most that is of use."""
        num_members = self._members.num_alive
        with self._lock:
            num_free = self._board.num_rows_free(at_most * num_members)
        return (num_free + num_open) / num_members

    # Pieces.

    def take(self) -> Held | None:
        """Lease a piece; None: there is none now."""
        while not (self._is_closed or self._host.stop.is_requested):
            with self._lock:
                found = self._candidate()
                self._is_hungry = found is None
            if found is None:
                return None
            if (held := self._lease_of(*found)) is not None:
                return held
        return None

    def _candidate(self) -> tuple[Piece, int] | None:
        """A piece and the number of its next lease."""
        while self._freed:
            piece, taken = self._freed[0]
            leases = self._board.leases_of(piece.shard)
            if leases.taken.get(piece.name) == taken and piece.name not in leases.ended:
                return piece, taken.number + 1
            del self._freed[0]
        fresh = self._board.next_fresh()
        return None if fresh is None else (fresh, 1)

    def _lease_of(self, piece: Piece, number: int) -> Held | None:
        num_lapses = self._lease.num_lapses
        is_ours = self._leases.take(piece.shard, piece.name, number)
        with self._lock:
            self._board.touched(piece.shard)
            if number > 1:
                self._freed = [freed for freed in self._freed if freed[0] != piece]
            elif self._board.next_fresh() == piece:
                self._board.passed()
        if not is_ours:
            self._see(piece.shard)
            return None
        # Leases go after the finished file is there: with an old view we may be the first again.
        if self._session.ledger.is_finished(piece.shard):
            self._leases.drop(piece.shard, piece.name, number)
            self._note_others(piece.shard)
            return None
        if number > 1:
            logger.info("%s is taken over from a joined run that is gone", _described(piece))
        return Held(piece, number, num_lapses)

    def stands(self, held: Held) -> bool:
        """Whether it is ours, or so long has passed that others may have taken us for gone."""
        num_lapses = self._lease.num_lapses
        if held.is_lost:
            return False
        if self._lease.is_fresh and held.num_lapses == num_lapses:
            return True
        shard, name = held.piece.shard, held.piece.name
        taken = self._leases.look(shard).get(shard, ShardLeases()).taken.get(name)
        is_number = taken is not None and taken.number == held.number
        if taken and is_number and self._leases.holder(shard, name, taken) == self._lease.member:
            held.num_lapses = num_lapses
            return True
        held.is_lost = True
        logger.warning(
            "%s was taken over by another joined run, as this one showed no sign of life for long: "
            "what it has of that and is not durable is dropped",
            _described(held.piece),
        )
        return False

    def read(self, held: Held, num_expected: int) -> None:
        """It was read, and so is counted by whoever reads."""
        self._seen.counted(held.piece, num_expected)

    def ended(self, held: Held, num_expected: int) -> None:
        """All its results are durable."""
        if not held.is_lost:
            self._ended.put((held.piece, num_expected))

    def finished(self, shard: str, totals: Totals) -> None:
        """This member has finished it."""
        self.totals[shard] = totals
        with self._lock:
            self._board.close(shard)
        self._leases.forget([shard])

    def give_up(self, shard: str) -> None:
        """It cannot be read."""
        with self._lock:
            self._board.close(shard)

    # Its own thread.

    def _run(self) -> None:
        try:
            while True:
                is_last = self._is_closed
                self._tell_ended()
                self._collect()
                if is_last:
                    return
                if not self._host.stop.is_requested:
                    self._look()
                self._wait()
        except BaseException as error:  # the thread's edge: `check` raises it
            self._error = error

    def _wait(self) -> None:
        """Until something is to be said, or it is time for another look."""
        hungry_s = _HUNGRY_S if self._session.store.is_local else _REMOTE_HUNGRY_S
        waited_s = 0.0
        while not self._is_closed and self._ended.empty():
            if waited_s >= (hungry_s if self._is_hungry else _FED_S):
                return
            time.sleep(_WAIT_S)
            waited_s += _WAIT_S

    def _tell_ended(self) -> None:
        touched = set()
        while not self._ended.empty():
            piece, num_expected = self._ended.get()
            self._leases.end(piece.shard, piece.name, num_expected)
            touched.add(piece.shard)
        for shard in touched:
            self._see(shard)
        self._begin_folds(touched)

    def _look(self) -> None:
        self._members.look()
        found = self._leases.look()
        with self._lock:
            shards = self._board.open_shards()
        for shard in shards:
            self._take_in(shard, found.get(shard, ShardLeases()))
        self._begin_folds(shards)
        if self._is_hungry:
            self._look_for_freed()

    def _see(self, shard: str) -> None:
        self._take_in(shard, self._leases.look(shard).get(shard, ShardLeases()))

    def _take_in(self, shard: str, leases: ShardLeases) -> None:
        with self._lock:
            is_as_ever = self._board.see(shard, leases)
        self._seen.see(shard, leases.ended)
        if is_as_ever:
            return
        if self._session.ledger.is_finished(shard):
            self._note_others(shard)
        else:
            with self._lock:
                self._board.begin_again()

    def _note_others(self, shard: str) -> None:
        """Another member has finished it."""
        with self._lock:
            self._board.close(shard)
        if self._seen.finished(shard, self._session.ledger.totals_of(shard).rows):
            self._host.counters.add_shard_finished()

    def _look_for_freed(self) -> None:
        with self._lock:
            held = list(self._board.held())
        freed = [found for found in held if self._is_free(found[0].shard, found[0].name, found[1])]
        with self._lock:
            self._freed = freed

    def _is_free(self, shard: str, name: str, taken: Taken) -> bool:
        holder = self._leases.holder(shard, name, taken)
        return holder is None or (holder != self._lease.member and self._members.is_gone(holder))

    def _begin_folds(self, shards: Iterable[str]) -> None:
        window_rows = self._session.window_rows
        for shard in shards:
            with self._lock:
                ended = self._board.ended(shard)
                taken = self._board.leases_of(shard).taken.get(FOLD)
            if ended is None or shard in self._folds:
                continue
            if taken is not None and not self._is_free(shard, FOLD, taken):
                continue
            if self._leases.take(shard, FOLD, 1 if taken is None else taken.number + 1):
                expected = [0] * self._session.num_windows_of(self._shards[shard])
                for piece, num_expected in ended:
                    expected[piece.rows.start // window_rows] += num_expected
                self._folds.begin(self._shards[shard], expected)

    def _collect(self) -> None:
        try:
            for shard, totals in self._folds.collect().items():
                self.finished(shard, totals)
        except IncompleteShard as error:
            # What the leases say is wrong: the next start looks at the parts.
            self._leases.forget([error.shard])
            raise
        for shard in self._folds.input_errors:
            self.give_up(shard)


def _described(piece: Piece) -> str:
    return f"rows {piece.rows.start} to {piece.rows.stop - 1} of {piece.shard}"
