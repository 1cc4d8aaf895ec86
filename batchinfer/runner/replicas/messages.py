"""What a run's process and its replicas tell each other. Pickled: both are the same program.

Rows are never among it: a replica reads what it is given and writes its parts itself. Must not
know: how messages travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchinfer.config import Job
from batchinfer.engine.base import EngineFacts
from batchinfer.ledger import Totals
from batchinfer.ledger.lease import Proof
from batchinfer.model import ModelFacts
from batchinfer.runner.options import RunOptions
from batchinfer.runner.width.control import WidthReport
from batchinfer.source import Fingerprint
from batchinfer.telemetry import Sums, Tallied
from batchinfer.verdict import Setup


@dataclass(frozen=True, slots=True)
class ReplicaOrder:
    """The first message to a replica: the run that it has a share in, and its place in that.

    `first_sequence`: after which it numbers its parts; no two processes of a run have the same.
    """

    job: Job
    options: RunOptions
    model: ModelFacts
    digest: str
    window_rows: int
    run: int
    carried: bytes | None  # the schema, in Arrow's IPC format
    lease: Proof
    first_sequence: int
    num_rows: int  # its fair share of what is to compute, x samples, before the filter
    parent_pid: int
    cores: Sequence[int]
    log_level: int


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """A shard without its store, which each process opens for itself."""

    name: str
    root: str
    key: str
    size_bytes: int
    version: str
    partitions: Any
    outer_partitions: Any


@dataclass(frozen=True, slots=True)
class Give:
    """A piece to compute, `name`: rows [start, stop) of a window, or all of a shard."""

    name: str
    shard: ShardPlace
    fingerprint: Fingerprint
    windows: range
    rows: tuple[int, int]
    is_whole: bool
    has_parts: bool
    is_finished: bool


@dataclass(frozen=True, slots=True)
class NoMore:
    """Nothing will be given any more: end once all is durable."""


@dataclass(frozen=True, slots=True)
class StopNow:
    """Compute no further, make durable what is finished, and end."""

    code: int
    reason: str


ToReplica = Give | NoMore | StopNow


@dataclass(frozen=True, slots=True)
class HasRoom:
    """Its reader has room for more."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Its engine is up, and takes so many requests at once."""

    facts: EngineFacts
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class Beat:
    """How it stands, several times a second. `in_flight`: None: as before."""

    sums: Sums
    in_flight: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Stands:
    """What its engine did so far, and what that is judged by; now and then."""

    setup: Setup
    tallied: Tallied


@dataclass(frozen=True, slots=True)
class Tuned:
    """How many sequences its engine runs at once from now on."""

    report: WidthReport


@dataclass(frozen=True, slots=True)
class Said:
    """A log record of ours."""

    logger: str
    level: int
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    name: str


@dataclass(frozen=True, slots=True)
class Read:
    name: str
    num_expected: int
    num_done: int


@dataclass(frozen=True, slots=True)
class Durable:
    name: str
    num_results: int


@dataclass(frozen=True, slots=True)
class PieceEnded:
    """All its results are durable in parts. `schema`: of its shard's output, in IPC format."""

    name: str
    num_expected: int
    schema: bytes


@dataclass(frozen=True, slots=True)
class ShardFinished:
    """It was all of a shard, whose finished file is there."""

    name: str
    totals: Totals


@dataclass(frozen=True, slots=True)
class PieceFailed:
    """The input's fault: its shard cannot be computed."""

    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last message. `error`: the name of a class of the error tree; empty: all went well.

    `is_limited`: it left rows out because of `--limit`.
    """

    error: str = ""
    message: str = ""
    is_limited: bool = False


OfPiece = Started | Read | Durable | PieceEnded | ShardFinished | PieceFailed
FromReplica = HasRoom | Ready | Beat | Stands | Tuned | Said | Ended | OfPiece
