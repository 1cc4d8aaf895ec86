"""How results are added to an output: parts, finished files, and what is merged on the way.

Must not know: engines, prompts, threads (its methods may be called from several). Keeps the four
rules of docs/architecture.md: see `finish_shard` for rules 1 and 3, `publish_part` for rule 2.
"""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import LeaseLost, TransientError
from batchinfer.ledger.layout import PartId, part_key
from batchinfer.ledger.records import Totals, fingerprint_record
from batchinfer.ledger.results import Results, read_facts, read_schema
from batchinfer.ledger.shard_fold import IncompleteShard, ShardFold, UnreadablePart
from batchinfer.sink import FACTS_KEY, part_writer, write_table
from batchinfer.source import Fingerprint, cast_table
from batchinfer.storage import Store
from batchinfer.tasks import Task
from batchinfer.tasks.base import num_failed

logger = logging.getLogger("batchinfer.ledger")

_MAX_FOLD_TRIES = 5
#: Parts of one window that a fold has open at a time; fewer where the process may open few files.
MAX_OPEN_PARTS = 128
_FILES_BESIDE_PARTS = 16  # of the fold, and of what publishers, reader and engine open meanwhile
_FIRST_MERGED = 500_000_000  # sequence numbers of merged parts: past those of the writer


class Ledger(Results):
    """The parts and finished files of one output, for the run that adds to them."""

    def __init__(
        self,
        store: Store,
        facts: Mapping[str, Any],
        window_rows: int,
        *,
        num_samples: int = 1,
        task: Task | None = None,
        run: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`facts` go into every footer; among them `digest`, by which its files are known.

        `task` counts what finished files hold; without it only rows are counted. `run`: this run's
        number, by which merged parts are named; 0, nothing is merged. `check` raises if the output
        is ours no longer: what is written then, nobody could make sense of.
        """
        super().__init__(store, str(facts["digest"]))
        self._facts = dict(facts)
        self._task = task
        self._window_rows = window_rows
        self._num_samples = num_samples
        self._run = run
        self._is_shared = False
        self._check = check
        self._first_merged = _FIRST_MERGED
        self._num_merged = 0
        self._inputs: Mapping[str, Fingerprint] = {}

    def add_facts(self, **facts: Any) -> None:
        """Facts known only later (the engine's). Call before the first part is published."""
        self._facts.update(facts)

    def number_after(self, first_sequence: int) -> None:
        """Where its writer, one of several in a run, begins to number parts. Before the first."""
        self._first_merged = first_sequence + _FIRST_MERGED

    def share(self) -> None:
        """Others may be at work on the same shards: a finished file is created once, by whoever is
        first. Before the first.
        """
        self._is_shared = True

    def note_inputs(self, inputs: Mapping[str, Fingerprint]) -> None:
        """What each shard is, by name: their parts say so, should all records be lost."""
        self._inputs = inputs

    def publish_part(self, shard: str, part: PartId, table: pa.Table) -> None:
        """Make finished rows of one window durable. `table` is sorted by (row, sample)."""
        facts = self._facts_of(shard, part)
        key = part_key(shard, part)
        self._check()
        self._store.publish(key, lambda sink: write_table(sink, table, facts))
        try:
            self._check()
        except LeaseLost:
            self._store.delete([key])
            raise
        if self._is_shared and self.is_finished(shard):
            self._store.delete([key])  # too late: whoever finished it had these rows already

    def _facts_of(self, shard: str, part: PartId) -> dict[str, Any]:
        known = self._inputs.get(shard)
        of_input = {} if known is None else {"input": fingerprint_record(known)}
        own = {"shard": shard, "window": part.window, "run": part.run}
        return {**self._facts, **own, **of_input}

    def finish_directly(
        self,
        shard: str,
        schema: pa.Schema,
        table: pa.Table | None,
        num_expected: int,
        recheck: Callable[[], None],
    ) -> Totals:
        """Publish the finished file of a shard whose results are all in `table` (None: it has no
        rows).
        """

        def tables() -> Iterator[pa.Table]:
            have = 0 if table is None else table.num_rows
            if have != num_expected:
                raise IncompleteShard(shard, f"{shard}: {have} results for {num_expected} expected")
            if table is not None:
                yield table

        return self._publish_finished(shard, schema, tables, {}, recheck)

    def finish_shard(
        self,
        shard: str,
        schema: pa.Schema,
        num_expected: Sequence[int],
        recheck: Callable[[], None],
        check: Callable[[], None] = lambda: None,
    ) -> Totals:
        """Fold the shard's finished file (if any) and parts into its finished file, then delete the
        parts.

        `num_expected[w]`: results that window w must have. `recheck` runs before the file appears
        and raises if the shard changed meanwhile. Raises IncompleteShard, publishing nothing, if
        the counts do not fit.
        """
        fold = ShardFold(self, shard, self._window_rows, self._num_samples, check)
        for _ in range(_MAX_FOLD_TRIES):
            self._check()
            if self._is_shared and self.is_finished(shard):
                self.drop_parts(shard, self.parts_of(shard))
                return self.totals_of(shard)
            parts = self.parts_of(shard)
            try:
                parts = self._merge_many(fold, schema, parts)
                inherited = self._inherited(shard, parts)
                tables = partial(fold.tables, parts, num_expected)
                totals = self._publish_finished(shard, schema, tables, inherited, recheck)
            except FileNotFoundError:
                continue  # a part vanished: somebody else finished this shard. Look again.
            except UnreadablePart as error:
                self.set_aside(shard, error.part, str(error))
                continue
            self.drop_parts(shard, [*parts, *(self.parts_of(shard) if self._is_shared else ())])
            return totals
        raise TransientError(
            f"{self._store.url_of(shard)}: its parts kept vanishing while they were folded. "
            "Another run seems to be working on this output; start again when it has ended"
        )

    def drop_parts(self, shard: str, parts: Iterable[PartId]) -> None:
        """Delete parts of a shard that is finished, and of which they hold nothing more."""
        self._store.delete([part_key(shard, part) for part in parts])

    def is_finished(self, shard: str) -> bool:
        return self._store.stat(shard) is not None

    def settle(self, shard: str) -> None:
        """A finished file with parts beside it: fold in what they add, then delete them.

        They are what a run killed between publishing and deleting left (they add nothing), or
        retries of failed rows that were not folded yet (they may turn errors into results).
        """
        parts = self.parts_of(shard)
        finished = self.keys_of_finished(shard)
        failed = finished.codes(finished.is_error, self._num_samples)
        is_adding = False
        if len(failed):
            keys = self.keys_of_parts(shard, parts)
            is_adding = bool(np.isin(failed, keys.codes(~keys.is_error, self._num_samples)).any())
        if not is_adding:
            self.drop_parts(shard, parts)
            return
        schema = read_schema(self._store, shard).remove_metadata()
        counts = np.bincount(finished.row // self._window_rows)
        self.finish_shard(shard, schema, counts.tolist(), lambda: None)

    def _inherited(self, shard: str, parts: Sequence[PartId]) -> dict[str, Any]:
        """Where nothing was computed in this run: which engine the last part came from."""
        if "engine" in self._facts or not parts:
            return {}
        last = read_facts(self._store, part_key(shard, parts[-1]))
        return {"engine": (last or {}).get("engine")}

    def _merge_many(
        self, fold: ShardFold, schema: pa.Schema, parts: Sequence[PartId]
    ) -> list[PartId]:
        """Replace the parts of a window that has very many by fewer: a fold opens them all at once.

        The merged part is published before its sources are deleted, so a kill in between leaves
        results twice, of which the fold takes the earlier.
        """
        if self._run == 0:
            return list(parts)
        remaining: list[PartId] = []
        for window, group in groupby(parts, key=lambda part: part.window):
            waiting = list(group)
            max_open = _max_open_parts()
            while len(waiting) > max_open:
                sources, waiting = waiting[:max_open], waiting[max_open:]
                self._num_merged += 1
                merged = PartId(window, self._run, self._first_merged + self._num_merged)
                self._merge(fold, schema, sources, merged)
                waiting.append(merged)
                fold.check()
            remaining += waiting
        return remaining

    def _merge(
        self, fold: ShardFold, schema: pa.Schema, sources: Sequence[PartId], merged: PartId
    ) -> None:
        facts = self._facts_of(fold.shard, merged)

        def write(sink: BinaryIO) -> None:
            with part_writer(sink, schema) as writer:
                for table in fold.window(merged.window, sources):
                    written = cast_table(table, schema)
                    writer.write_table(written, row_group_size=max(1, table.num_rows))
                writer.add_key_value_metadata({FACTS_KEY: json.dumps(facts)})

        self._store.publish(part_key(fold.shard, merged), write)
        self._store.delete([part_key(fold.shard, part) for part in sources])

    def _publish_finished(
        self,
        shard: str,
        schema: pa.Schema,
        tables: Callable[[], Iterator[pa.Table]],
        inherited: Mapping[str, Any],
        recheck: Callable[[], None],
    ) -> Totals:
        totals = Totals()

        def write(sink: BinaryIO) -> None:  # again from the start where storage asks for it
            nonlocal totals
            totals = count_results(schema.empty_table(), self._task)
            with part_writer(sink, schema) as writer:
                for table in tables():
                    totals += count_results(table, self._task)
                    written = cast_table(table, schema)
                    writer.write_table(written, row_group_size=max(1, table.num_rows))
                footer = {**self._facts, **inherited, "shard": shard, **totals.as_dict()}
                writer.add_key_value_metadata({FACTS_KEY: json.dumps(footer)})
            recheck()
            self._check()

        if not self._is_shared:
            self._store.publish(shard, write)
        elif not self._store.publish_once(shard, write):
            return self.totals_of(shard)  # another's, which is as complete
        return totals


def _max_open_parts() -> int:
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_open = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return MAX_OPEN_PARTS
    return max(2, min(MAX_OPEN_PARTS, soft - num_open - _FILES_BESIDE_PARTS))


def count_results(table: pa.Table, task: Task | None) -> Totals:
    """What a table of results adds to the totals."""
    counted = task.count(table) if task is not None else {}
    return Totals(
        rows=table.num_rows,
        rows_failed=num_failed(table),
        prompt_tokens=pc.sum(table.column("num_prompt_tokens")).as_py() or 0,
        counts={name: counted[name] for name in (task.counts if task is not None else ())},
    )
