"""Finished files of shards of which every piece has ended, whoever computed them.

Must not know: who may fold, leases. One thread calls it; folds run in a thread of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.ledger import Totals
from batchinfer.runner.carried import Carrier
from batchinfer.runner.host import Host
from batchinfer.runner.session import Session
from batchinfer.sink import output_schema
from batchinfer.source import Shard, ShardReader

logger = logging.getLogger("batchinfer.runner")


class _FoldAbandonedError(Exception):
    """A fold that gave way to a stop. Nothing appeared; its parts stand."""


class Folds:
    def __init__(self, session: Session, host: Host) -> None:
        self._session = session
        self._host = host
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fold")
        self._folding: dict[Future[Totals], str] = {}
        self.input_errors: dict[str, InputError] = {}  # shards that have changed, by name

    def __contains__(self, shard: str) -> bool:
        return shard in self._folding.values()

    def begin(self, shard: Shard, expected: Sequence[int]) -> None:
        """`expected[w]`: results that window w must have."""
        self._folding[self._pool.submit(self._fold, shard, expected)] = shard.name

    def collect(self) -> Mapping[str, Totals]:
        """Totals of the shards whose folds have ended since, by name. Raises what one raised."""
        found: dict[str, Totals] = {}
        for future in [future for future in self._folding if future.done()]:
            shard = self._folding.pop(future)
            match future.exception():
                case None:
                    found[shard] = totals = future.result()
                    self._host.counters.add_shard_finished()
                    logger.info(
                        "shard finished: %s, %d rows, %d failed",
                        shard,
                        totals.rows,
                        totals.rows_failed,
                    )
                case _FoldAbandonedError():
                    pass  # whoever comes next folds
                case InputError() as error:
                    logger.error("%s", error)
                    self.input_errors[shard] = error
                case error:
                    raise error
        return found

    def close(self) -> None:
        """Wait for those that have begun, which a stop ends."""
        self._pool.shutdown(wait=True)

    def _fold(self, shard: Shard, expected: Sequence[int]) -> Totals:
        session = self._session
        totals = session.ledger.finish_shard(
            shard.name,
            self._schema_of(shard),
            expected,
            lambda: session.recheck(shard),
            self._keep_folding,
        )
        self._host.tuning.freed()
        return totals

    def _schema_of(self, shard: Shard) -> pa.Schema:
        """As who computed its rows had it: of the columns that are carried, and the task's."""
        job = self._session.job
        id_column = [job.input.id_column] if job.input.id_column else []
        columns = list(dict.fromkeys([*id_column, *job.input.keep_columns]))
        with ShardReader(shard, columns) as reader:
            fields = Carrier(job, self._session.carried).fields(reader.schema)
        return output_schema(fields, self._session.task.columns)

    def _keep_folding(self) -> None:
        if self._host.stop.is_requested:
            raise _FoldAbandonedError
