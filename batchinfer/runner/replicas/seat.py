"""A place for a replica, and what is known of the one there. Must not know: what it is given."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer import errors
from batchinfer.engine.base import Placement
from batchinfer.errors import BatchInferError
from batchinfer.runner.replicas.messages import Ended, Said
from batchinfer.runner.replicas.places import Replica

#: Deaths in a row without a durable row, after which a replica is not started again.
_MAX_FRUITLESS = 3
_PAUSES_S = (0.0, 1.0, 5.0)


@dataclass(slots=True)
class Seat:
    """A place for a replica, and the one that is there."""

    number: int
    placement: Placement
    replica: Replica | None = None
    is_placed: bool = False  # it has a place, where it computes or will
    silent_s: float = 0.0  # since it said something
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

    def died(self, why: str) -> None:
        """When it is started again, if it is."""
        self.num_fruitless = 0 if self.has_durable else self.num_fruitless + 1
        self.why = why
        self.is_given_up = self.num_fruitless >= _MAX_FRUITLESS
        self.due_s = time.monotonic() + _PAUSES_S[min(self.num_fruitless, len(_PAUSES_S) - 1)]

    @property
    def label(self) -> str:
        return self.placement.label


def error_of(last: Ended) -> BatchInferError:
    """What a replica ended with, as if it had been raised here."""
    kind = getattr(errors, last.error, None)
    if isinstance(kind, type) and issubclass(kind, BatchInferError) and kind is not errors.Stopped:
        return kind(last.message)
    return BatchInferError(last.message)


def say_again(said: Said, label: str) -> None:
    """A replica's log record, in this process's log."""
    fields = said.fields
    if said.level < logging.WARNING:  # the same warning of two is one
        fields = {**fields, "replica": label}
    logging.getLogger(said.logger).log(said.level, "%s", said.text, extra={"fields": fields})
