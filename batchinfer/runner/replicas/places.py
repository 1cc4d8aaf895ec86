"""Where replicas run, as seen by the one who gives out the work: here, or elsewhere.

Must not know: what replicas are given, what becomes of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from batchinfer.engine.base import Placement
from batchinfer.errors import TransientError
from batchinfer.runner.replicas.messages import FromReplica, ReplicaOrder, ToReplica
from batchinfer.runner.replicas.process import ReplicaProcess
from batchinfer.runner.session import Session
from batchinfer.telemetry import Counters

logger = logging.getLogger("batchinfer.runner")

#: Without a place for any replica, before it is said.
_SAY_S = 10.0


class Replica(Protocol):
    """A replica that was started. One thread calls it."""

    @property
    def where(self) -> str | None:
        """For people: where it computes. None: it waits for a place."""

    def fileno(self) -> int:
        """Readable when it has said something, or has ended."""

    def send(self, message: ToReplica) -> None:
        """Only once it has a place. Without waiting; to one that is gone it does nothing."""

    def messages(self) -> Iterator[FromReplica]:
        """What it has said by now."""

    @property
    def is_gone(self) -> bool: ...

    def how_ended(self) -> str:
        """For people; after its end."""

    def kill(self) -> None:
        """End it, and what it started, or leave nothing undone for that. Idempotent."""


class Places(Protocol):
    """All that a run may use. One thread calls it."""

    def appeared(self) -> Sequence[Placement]:
        """Places that were not there at the last call; at the first one all, at least one."""

    def start(self, placement: Placement, order: ReplicaOrder) -> Replica:
        """Begin to start a replica, without waiting for it."""

    @property
    def wait_s(self) -> float:
        """How long it may be that no replica has a place."""

    def lack(self) -> str:
        """For people: what places there are, beside those that are asked for."""

    def close(self) -> None:
        """After the last replica has ended. Idempotent."""


class WaitForPlace:
    """How long it has been that no replica had a place."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._waited_s = 0.0

    def passed(self, seconds: float, *, is_over: bool) -> bool:
        """So much more time has. -> whether it is time to say that nothing goes on. Raises
        TransientError once it was too long.
        """
        if is_over:
            self._waited_s = 0.0
            return False
        before_s, self._waited_s = self._waited_s, self._waited_s + seconds
        if self._waited_s > self._places.wait_s:
            raise TransientError(
                f"there was no place for a replica within {self._places.wait_s:g} s: "
                f"{self._places.lack()}. Start again when there is one"
            )
        if before_s < _SAY_S <= self._waited_s:
            logger.info("no replica has a place yet: %s", self._places.lack())
            return True
        return False


class Here:
    """This machine: a process at each of places that are known from the start."""

    wait_s = math.inf  # each has its place at once, or is being started again

    def __init__(self, placements: Sequence[Placement]) -> None:
        self._placements = placements

    def appeared(self) -> Sequence[Placement]:
        appeared, self._placements = self._placements, ()
        return appeared

    def start(self, placement: Placement, order: ReplicaOrder) -> Replica:
        return ReplicaProcess(placement, order)

    def lack(self) -> str:
        return ""

    def close(self) -> None: ...


def open_places(session: Session, counters: Counters) -> Places | None:
    """Where the replicas of a run are to be; None: this process computes by itself.

    Raises ConfigError, TransientError.
    """
    job = session.job
    if job.executor == "ray":
        from batchinfer.runner.replicas.on_ray import open_ray

        counters.set_phase("starting Ray")
        num_gpus = session.start.kind.num_gpus(job)
        assert not isinstance(job.engine.devices, tuple)
        return open_ray(job.engine.devices, num_gpus, session.num_useful_replicas)
    placements = session.placements()
    is_alone = len(placements) == 1 and placements[0].is_anywhere
    return None if is_alone else Here(placements)
