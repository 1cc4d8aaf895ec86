"""What works beside the engine's thread: reader, work in order, writer. From claims to shards.

Must not know: engines. Invariant: after `drain` every row that the engine finished is durable, or
`writer_error` says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from batchinfer.errors import InputError
from batchinfer.ledger import Totals
from batchinfer.prompt import RowPrompter
from batchinfer.runner.claims import Claim
from batchinfer.runner.host import Host
from batchinfer.runner.publishing import ResultTables
from batchinfer.runner.reader import Reader
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.session import Session
from batchinfer.runner.writer import Writer
from batchinfer.tasks import Result

_READER_END_S = 1.5


class Pipeline:
    """Rows come out of `ready`, results go into `put`."""

    def __init__(
        self,
        session: Session,
        claims: Iterator[Claim],
        prompter: RowPrompter,
        host: Host,
        on_first_durable: Callable[[], None],
    ) -> None:
        packing = session.job.packing
        self.ready = ReadyWork(order=packing.order, max_tokens=packing.buffer_tokens)
        tables = ResultTables(session.task, prompter.decode, session.run)
        self._writer = Writer(
            session.ledger,
            tables,
            session.job.checkpoint,
            host,
            on_first_durable=on_first_durable,
        )
        self._reader = Reader(session, claims, prompter, self.ready, self._writer, host)

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
