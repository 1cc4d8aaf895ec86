"""How the results of one shard are read together: its finished file and parts, window by window.

Opens and checks what `fold` folds. Must not know: who publishes the result. Invariant (rule 1 of
docs/architecture.md): a window comes out with as many results as are due, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from batchinfer.errors import ConfigError, TransientError
from batchinfer.ledger.fold import Cursor, UnreadableSource, batch_bytes_of, fold_window
from batchinfer.ledger.layout import PartId, part_key
from batchinfer.ledger.results import Results, damaged


class IncompleteShard(TransientError):
    """A fold found fewer or more results than the shard has rows: nothing was published."""

    def __init__(self, shard: str, message: str) -> None:
        super().__init__(message)
        self.shard = shard


class UnreadablePart(Exception):
    """A part is no Parquet file, breaks off, or belongs elsewhere: it is to be set aside."""

    def __init__(self, part: PartId, problem: str) -> None:
        super().__init__(problem)
        self.part = part


@dataclass(frozen=True, slots=True)
class ShardFold:
    """The fold over one shard's files. `check` runs after each table, and may raise to give up."""

    results: Results
    shard: str
    window_rows: int
    num_samples: int
    check: Callable[[], None] = lambda: None

    def tables(self, parts: Sequence[PartId], num_expected: Sequence[int]) -> Iterator[pa.Table]:
        """Every result of the shard, in order of (row, sample).

        `num_expected[w]`: results that window w must have. Raises IncompleteShard, UnreadablePart,
        and FileNotFoundError for a part that vanished.
        """
        parts_of_window = {w: list(group) for w, group in groupby(parts, key=lambda p: p.window)}
        num_windows = max([len(num_expected), *(w + 1 for w in parts_of_window)])
        with ExitStack() as files:
            finished = self._finished_cursor(files)
            for window in range(num_windows):
                expected = num_expected[window] if window < len(num_expected) else 0
                have = 0
                for table in self.window(window, parts_of_window.get(window, []), finished):
                    have += table.num_rows
                    yield table
                    self.check()
                if have != expected:
                    raise IncompleteShard(
                        self.shard,
                        f"{self._url}: window {window} has {have} results where {expected} are "
                        "due, so the finished file was not written. Start again: what is missing "
                        "is computed",
                    )

    def window(
        self, window: int, parts: Sequence[PartId], finished: Cursor | None = None
    ) -> Iterator[pa.Table]:
        """The winning results of one window among `parts` and the finished file."""
        with ExitStack() as files:
            cursors = [finished] if finished is not None else []
            batch_bytes = batch_bytes_of(len(parts))
            try:
                for rank, part in enumerate(parts, start=1):
                    source = self.results.store.open(part_key(self.shard, part))
                    files.callback(source.close)
                    cursors.append(Cursor(source, rank=rank, batch_bytes=batch_bytes))
                    why = self.results.why_foreign_part(cursors[-1].facts, self.shard, part)
                    if why is not None:
                        raise UnreadableSource(rank, why)
                start = window * self.window_rows
                stop = start + self.window_rows
                yield from fold_window(cursors, start, stop, num_samples=self.num_samples)
            except UnreadableSource as error:
                if error.rank == 0:
                    raise self._unreadable_finished(error) from error
                raise UnreadablePart(parts[error.rank - 1], str(error)) from error

    def _finished_cursor(self, files: ExitStack) -> Cursor | None:
        try:
            source = self.results.store.open(self.shard)
            files.callback(source.close)
            cursor = Cursor(source, rank=0, batch_bytes=batch_bytes_of(1))
        except FileNotFoundError:
            return None
        except UnreadableSource as error:
            raise self._unreadable_finished(error) from error
        self.results.finished_facts(self.shard, cursor.facts)
        return cursor

    def _unreadable_finished(self, error: UnreadableSource) -> ConfigError:
        """Unlike storage that is down, this does not heal: a repeated start would fail again."""
        return damaged(self._url, error)

    @property
    def _url(self) -> str:
        return self.results.store.url_of(self.shard)
