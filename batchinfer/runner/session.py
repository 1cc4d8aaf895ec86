"""A start that holds the lease and knows what to do: immutable, made by `take_over`.

Must not know: how rows are computed, how it ended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.config import Job
from batchinfer.engine.base import Placement
from batchinfer.errors import InputError
from batchinfer.ledger import Holder, Lease, Ledger, Survey, Totals, layout
from batchinfer.model import ModelFacts
from batchinfer.runner.beside import Beside
from batchinfer.runner.options import RunOptions
from batchinfer.runner.start import Start
from batchinfer.source import Fingerprint, RowFilter, Shard
from batchinfer.storage import Store, is_s3
from batchinfer.tasks import Task

logger = logging.getLogger("batchinfer.runner")

#: Fewer rows for each replica are not worth the start of its engine.
MIN_ROWS_EACH = 8


@dataclass(frozen=True, slots=True)
class Session:
    """What a run works from. `run` is 0 if there is nothing to compute: then it has no record."""

    start: Start
    holder: Holder
    lease: Lease
    digest: str
    window_rows: int
    first_run: int  # since the last restart
    survey: Survey
    beside: Beside  # what is there of shards that left the input
    fingerprints: Mapping[str, Fingerprint]
    carried: pa.Schema | None  # the id and kept columns; None: each shard's own types
    ledger: Ledger
    pending: Sequence[Shard]  # of this run's slice
    finished: Mapping[str, Totals]  # what is known without reading footers again
    run: int
    written: Mapping[str, bytes]  # records of this start, by key

    @property
    def job(self) -> Job:
        return self.start.job

    @property
    def task(self) -> Task:
        return self.start.task

    @property
    def options(self) -> RunOptions:
        return self.start.options

    @property
    def model(self) -> ModelFacts:
        return self.start.model

    @property
    def store(self) -> Store:
        return self.start.store

    @property
    def shards(self) -> Sequence[Shard]:
        """The whole input."""
        return self.start.shards

    @property
    def is_input_local(self) -> bool:
        return all(not is_s3(path) for path in self.job.input.path)

    @property
    def row_filter(self) -> RowFilter | None:
        return self.start.row_filter

    @property
    def num_useful_replicas(self) -> int:
        """No more than there are rows for; with `limit` one."""
        if self.options.limit is not None:
            return 1
        return max(1, self.num_rows_of(self.pending) // MIN_ROWS_EACH)

    def placements(self) -> Sequence[Placement]:
        """Where its engines run on this machine, as many as are of use."""
        places, num_useful = self.start.kind.placements(self.job), self.num_useful_replicas
        if num_useful >= len(places):
            return places
        why = "with --limit" if self.options.limit is not None else "for so few rows"
        logger.info("%d of %d replicas are started %s", num_useful, len(places), why)
        return places[:num_useful]

    def num_windows_of(self, shard: Shard) -> int:
        return -(-self.fingerprints[shard.name].num_rows // self.window_rows)

    def num_rows_of(self, shards: Iterable[Shard]) -> int:
        """Input rows of shards, before the filter."""
        return sum(self.fingerprints[s.name].num_rows for s in shards)

    def check_content(self, shard: Shard, footer_sha256: str) -> None:
        """Raise InputError if a shard of the right size and time has another footer than before.

        Tools that put a file's time back hide what they changed; its footer is read anyway.
        """
        if footer_sha256 != self.fingerprints[shard.name].footer_sha256:
            raise InputError(
                f"{shard.url} is not the file that this output was begun with: its size and time "
                "of change are the same, its footer is different. Bring the old file back or use "
                "another output.path. To compute it again, `touch` it, delete "
                f"{self._results(shard)} and start again"
            )

    def recheck(self, shard: Shard) -> None:
        """Raise InputError if the shard is not what it was when this run listed it."""
        now = shard.store.stat(shard.key)
        if now is None or (now.size_bytes, now.version) != (shard.size_bytes, shard.version):
            what = "vanished" if now is None else "changed"
            raise InputError(
                f"{shard.url} {what} while it was computed, so its finished file is not written; "
                "its rows that were durable stay in parts, other shards are not touched. Bring the "
                "old file back and start again. To compute it again, delete "
                f"{self._results(shard)} and start again"
            )

    def _results(self, shard: Shard) -> str:
        """All that there can be of a shard's results."""
        url_of = self.store.url_of
        return f"{url_of(shard.name)} and {url_of(layout.parts_prefix(shard.name))}"
