"""What works beside the engine's thread: reader, work in order, writer. From claims to shards.

Must not know: engines. Invariant: after `drain` every row that the engine finished is durable, or
`writer_error` says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from batchinfer.errors import InputError
from batchinfer.ledger import Totals
from batchinfer.prompt import RowPrompter
from batchinfer.runner.claims import Claim, ClaimWatcher
from batchinfer.runner.host import Host
from batchinfer.runner.publishing import ResultTables
from batchinfer.runner.reader import Reader
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.session import Session
from batchinfer.runner.writer import Writer
from batchinfer.tasks import Result

_READER_END_S = 1.5


@dataclass(frozen=True, slots=True)
class Share:
    """That several compute a run: who is told what became of one's claims.

    `first_sequence`: after which its parts are numbered.
    """

    watcher: ClaimWatcher
    first_sequence: int


class Pipeline:
    """Rows come out of `ready`, results go into `put`."""

    def __init__(
        self,
        session: Session,
        claims: Iterator[Claim],
        prompter: RowPrompter,
        host: Host,
        on_first_durable: Callable[[], None],
        share: Share | None = None,
    ) -> None:
        """`share`: None, nobody else computes the run."""
        packing = session.job.packing
        watcher = share.watcher if share is not None else None
        self.ready = ReadyWork(
            order=packing.order,
            max_tokens=packing.buffer_tokens,
            on_start=watcher.started if watcher is not None else None,
        )
        first_sequence = share.first_sequence if share is not None else 0
        tables = ResultTables(session.task, prompter.decode, session.run, first_sequence)
        self._writer = Writer(
            session.ledger,
            tables,
            session.job.checkpoint,
            host,
            on_first_durable=on_first_durable,
            watcher=watcher,
        )
        self._reader = Reader(session, claims, prompter, self.ready, self._writer, host, watcher)

    def start(self) -> None:
        self._writer.start()
        self._reader.start()

    def put(self, results: list[Result]) -> None:
        """Hand over finished rows; waits while too many bytes wait for storage."""
        self._writer.put(results)

    @property
    def has_failed(self) -> bool:
        return self._writer.error is not None or self._reader.error is not None

    @property
    def reader_error(self) -> BaseException | None:
        return self._reader.error

    @property
    def writer_error(self) -> BaseException | None:
        return self._writer.error

    @property
    def input_errors(self) -> Mapping[str, InputError]:
        """Shards that could not be read to their end, or changed meanwhile."""
        return MappingProxyType({**self._reader.input_errors, **self._writer.input_errors})

    @property
    def finished(self) -> Mapping[str, Totals]:
        return self._writer.finished

    @property
    def is_limited(self) -> bool:
        """Whether `--limit` ended the reading before the input did."""
        return self._reader.is_limited

    def drain(self, *, finish_shards: bool) -> None:
        """Read no further, and make durable what is finished."""
        self._reader.stop()
        self._reader.join(_READER_END_S)
        self._reader.warn_of_shortened()
        self._writer.drain(finish_shards=finish_shards)
