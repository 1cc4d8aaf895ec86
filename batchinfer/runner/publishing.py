"""Results -> durable files: parts, finished files, folds. Each call is one piece of work.

Its methods are called by the threads of a pool. Must not know: which results are waiting, when they
are due, threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.ledger import Ledger, PartId, Totals
from batchinfer.runner.claims import ClaimWatcher
from batchinfer.runner.host import Host
from batchinfer.runner.shard_progress import ShardProgress
from batchinfer.sink import build_table
from batchinfer.tasks import Detokenize, Result, Task
from batchinfer.tasks.base import num_failed
from batchinfer.telemetry import Counters

logger = logging.getLogger("batchinfer.runner")


class FoldAbandonedError(Exception):
    """A fold that gave way to a stop. Nothing appeared; its parts stand."""


@dataclass(frozen=True, slots=True)
class ResultTables:
    """How results of this run become tables, and what of them is counted."""

    task: Task
    detokenize: Detokenize
    run: int
    first_sequence: int = 0  # of several writers in a run each numbers its parts after another

    def build(self, results: Sequence[Result], schema: pa.Schema) -> pa.Table:
        return build_table(
            results, schema, run=self.run, task=self.task, detokenize=self.detokenize
        )

    def count_durable(self, table: pa.Table, counters: Counters) -> None:
        counters.add_durable(table.num_rows, num_failed(table), self.task.count(table))


class Publishing:
    """What of a run's results becomes durable, and how. All methods raise what storage raises."""

    def __init__(
        self,
        ledger: Ledger,
        tables: ResultTables,
        host: Host,
        on_first_durable: Callable[[], None],
        should_stop: Callable[[], bool],
        watcher: ClaimWatcher,
    ) -> None:
        """`should_stop`: whether folds are to be left to the next start."""
        self._ledger = ledger
        self._tables = tables
        self._host = host
        self._on_first_durable = on_first_durable
        self._should_stop = should_stop
        self._watcher = watcher
        self._has_durable = False
        self.finished: dict[str, Totals] = {}

    def part(self, shard: ShardProgress, part: PartId, results: Sequence[Result]) -> None:
        """Results of one window, as a part."""
        if not self._watcher.stands(shard.claim_name):  # whoever has it now computes these rows
            self._host.counters.add_computed(-len(results), 0, 0)
            return
        started_s = time.monotonic()
        table = self._tables.build(results, shard.schema)
        self._ledger.publish_part(shard.name, part, table)
        self._count_durable(shard, table)
        logger.debug(
            "part published: %s %s, %d rows, %.3f s",
            shard.name,
            part.name,
            len(results),
            time.monotonic() - started_s,
        )

    def whole(self, shard: ShardProgress, results: Sequence[Result]) -> None:
        """All results of a shard, as its finished file. Raises InputError, see `recheck`."""
        if not self._watcher.stands(shard.claim_name):
            self._host.counters.add_computed(-len(results), 0, 0)
            return
        table = self._tables.build(results, shard.schema) if results else None
        num_expected = sum(shard.num_expected.values())
        totals = self._ledger.finish_directly(
            shard.name, shard.schema, table, num_expected, shard.recheck
        )
        if table is not None:
            self._count_durable(shard, table)
        self._note_finished(shard, totals)

    def fold(self, shard: ShardProgress) -> None:
        """What is durable of a shard, as its finished file. Raises InputError, and
        FoldAbandonedError if the run is to stop.
        """
        if not self._watcher.stands(shard.claim_name):
            return
        totals = self._ledger.finish_shard(
            shard.name, shard.schema, shard.expected_by_window, shard.recheck, self._keep_folding
        )
        self._host.tuning.freed()  # what a fold took, nobody needs until the next
        self._note_finished(shard, totals)

    def _keep_folding(self) -> None:
        if self._should_stop():
            raise FoldAbandonedError

    def _note_finished(self, shard: ShardProgress, totals: Totals) -> None:
        self.finished[shard.name] = totals
        logger.info(
            "shard finished: %s, %d rows, %d failed", shard.name, totals.rows, totals.rows_failed
        )
        self._host.counters.add_shard_finished()
        self._watcher.finished(shard.claim_name, totals)

    def _count_durable(self, shard: ShardProgress, table: pa.Table) -> None:
        self._tables.count_durable(table, self._host.counters)
        self._watcher.durable(shard.claim_name, table.num_rows)
        if not self._has_durable:
            self._has_durable = True
            self._on_first_durable()
