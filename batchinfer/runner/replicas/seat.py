"""A place for a replica, and what is known of the one there. Must not know: what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer import errors
from batchinfer.engine.base import Placement
from batchinfer.errors import BatchInferError
from batchinfer.runner.replicas.messages import Ended
from batchinfer.runner.replicas.process import ReplicaProcess


@dataclass(slots=True)
class Seat:
    """A place for a replica, and the one that is there."""

    number: int
    placement: Placement
    process: ReplicaProcess | None = None
    is_asking: bool = False
    is_ready: bool = False
    has_durable: bool = False  # since it was started
    num_fruitless: int = 0  # deaths in a row without a durable row
    num_starts: int = 0
    due_s: float = 0.0  # to be started again
    is_given_up: bool = False
    in_flight: Sequence[str] = ()
    last: Ended | None = None
    why: str = ""  # of its last death

    @property
    def label(self) -> str:
        return self.placement.label


def error_of(last: Ended) -> BatchInferError:
    """What a replica ended with, as if it had been raised here."""
    kind = getattr(errors, last.error, None)
    if isinstance(kind, type) and issubclass(kind, BatchInferError) and kind is not errors.Stopped:
        return kind(last.message)
    return BatchInferError(last.message)
