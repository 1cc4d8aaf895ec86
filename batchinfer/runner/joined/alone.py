"""The pieces of a member as claims of the one pipeline of its process.

Must not know: stores, leases' content, engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.ledger import Totals
from batchinfer.runner.claims import Claim
from batchinfer.runner.host import Host
from batchinfer.runner.joined.joint import Held, Joint
from batchinfer.runner.session import Session

_WAIT_S = 0.1
#: In results: of an engine that is not up yet, so nothing is known of it.
_UNKNOWN_CAPACITY = 128
WAITING = "waiting for other joined runs"


class JointClaims:
    """Gives out claims, from a reader's thread, and is told of them, as a `ClaimWatcher`."""

    def __init__(
        self, joint: Joint, session: Session, host: Host, capacity: Callable[[], int | None]
    ) -> None:
        """`capacity`: how many results the engine has in flight at once; None: it is not up."""
        self._joint = joint
        self._session = session
        self._host = host
        self._capacity = capacity
        self._shards = {shard.name: shard for shard in session.pending}
        self._held: dict[str, Held] = {}  # by name of the claim
        self._given: dict[str, int] = {}  # results of it that are to be computed, as far as known
        self._num_given = 0

    def __iter__(self) -> Iterator[Claim]:
        """Until every shard is finished, by whomever. Waits while others may still vanish."""
        counters = self._host.counters
        while not (self._host.stop.is_requested or self._joint.is_over):
            self._joint.check()
            held = self._joint.take() if self._has_room() else None
            if held is not None:
                if counters.phase == WAITING:
                    counters.set_phase("computing" if self._capacity() else "reading input")
                yield self._claim(held)
            else:
                if self._num_open <= 0:
                    counters.set_phase(WAITING)
                time.sleep(_WAIT_S)

    @property
    def _num_open(self) -> int:
        return self._num_given - self._host.counters.rows_computed

    def _has_room(self) -> bool:
        """Whether we may have more: twice what the engine runs at once, but not more than our share
        of what nobody has.
        """
        num_open = self._num_open
        if num_open <= 0:
            return True
        num_samples = self._session.task.num_samples
        most = 2 * (self._capacity() or _UNKNOWN_CAPACITY * num_samples)
        fair = self._joint.num_rows_fair(num_open // num_samples, most // num_samples)
        return num_open < min(most, fair * num_samples)

    def _claim(self, held: Held) -> Claim:
        session, piece = self._session, held.piece
        name = f"{len(self._given) + 1}"
        self._held[name] = held
        self._given[name] = len(piece.rows) * session.task.num_samples
        self._num_given += self._given[name]
        window = piece.rows.start // session.window_rows
        return Claim(
            shard=self._shards[piece.shard],
            windows=range(window, window + 1 if len(piece.rows) else window),
            rows=(piece.rows.start, piece.rows.stop),
            is_whole=piece.is_whole,
            has_parts=held.was_begun or piece.shard in session.survey.with_parts,
            name=name,
        )

    def started(self, claim: str) -> None: ...

    def read(self, claim: str, num_expected: int, num_done: int) -> None:
        num_left = num_expected - num_done
        self._num_given += num_left - self._given[claim]
        self._given[claim] = num_left
        self._joint.read(self._held[claim], num_expected)

    def stands(self, claim: str) -> bool:
        return self._joint.stands(self._held[claim])

    def durable(self, claim: str, num_results: int) -> None: ...

    def ended(self, claim: str, num_expected: int, schema: pa.Schema) -> None:
        self._joint.ended(self._held.pop(claim), num_expected)

    def finished(self, claim: str, totals: Totals) -> None:
        self._joint.finished(self._held.pop(claim).piece.shard, totals)

    def failed(self, claim: str, error: InputError) -> None:
        if (held := self._held.get(claim)) is not None:
            self._joint.give_up(held.piece.shard)
