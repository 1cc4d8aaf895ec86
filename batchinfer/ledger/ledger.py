"""What is done in an output, read from the parts and finished files themselves, and how a shard is
finished.

Must not know: engines, prompts, threads (its methods may be called from several). Keeps the four
rules of docs/architecture.md: see `finish_shard` for rules 1 and 3, `publish_part` for rule 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.errors import ConfigError, TransientError
from batchinfer.ledger.fold import Cursor, UnreadableSource, batch_bytes_of, fold_window
from batchinfer.ledger.keys import Keys, concat_keys, read_keys
from batchinfer.ledger.layout import (
    LEASES_PREFIX,
    LOGS_PREFIX,
    META,
    PARTS_PREFIX,
    RUNS_PREFIX,
    STATUS_PREFIX,
    UNREADABLE_PREFIX,
    PartId,
    parse_part_key,
    part_key,
    parts_prefix,
    run_of_key,
)
from batchinfer.ledger.records import Totals
from batchinfer.sink import FACTS_KEY, file_facts, part_writer, write_table
from batchinfer.source import cast_table
from batchinfer.storage import Store

logger = logging.getLogger("batchinfer.ledger")

_REMOTE_READS = 16  # requests for parts that are under way together; a wait each
_MAX_FOLD_TRIES = 5
#: Parts of one window that a fold has open at a time; fewer where the process may open few files.
MAX_OPEN_PARTS = 128
_FILES_BESIDE_PARTS = 16  # of the fold, and of what publishers, reader and engine open meanwhile
_FIRST_MERGED = 500_000_000  # sequence numbers of merged parts: past those of the writer


@dataclass(slots=True)
class Survey:
    """One listing of an output: which shards have a finished file, which have parts.

    `nested`: folders below that are outputs of their own, of whose files none is among the others.
    `last_run`: the highest run number that anything is named by.
    """

    finished: set[str] = field(default_factory=set)
    with_parts: set[str] = field(default_factory=set)
    nested: set[str] = field(default_factory=set)
    last_run: int = 0


class IncompleteShard(TransientError):
    """A fold found fewer or more results than the shard has rows: nothing was published."""


class Ledger:
    """The parts and finished files of one output.

    `facts` go into every footer; among them `digest`, by which a part of another job is told.
    """

    def __init__(
        self, store: Store, facts: Mapping[str, Any], window_rows: int, *, num_samples: int = 1
    ) -> None:
        self._store = store
        self._facts = dict(facts)
        structured = (facts.get("sampling") or {}).get("structured") or {}
        self._has_schema = structured.get("json_schema") is not None
        self._window_rows = window_rows
        self._num_samples = num_samples
        self.run = 0  # this run's number, once it has one: merged parts are named by it
        #: Raises if the output is ours no longer: what is written then nobody could make sense of.
        self.check: Callable[[], None] = lambda: None
        self._num_merged = 0

    @property
    def store(self) -> Store:
        return self._store

    def add_facts(self, **facts: Any) -> None:
        """Facts known only later (the engine's). Call before the first part is published."""
        self._facts.update(facts)

    def survey(self) -> Survey:
        """List the output once. Memory: a name for each shard, nothing for each part."""
        survey = Survey()
        for info in self._store.list():
            if info.key.startswith(PARTS_PREFIX):
                if (parsed := parse_part_key(info.key)) is not None:
                    survey.with_parts.add(parsed[0])
                    survey.last_run = max(survey.last_run, parsed[1].run)
            elif info.key.startswith((RUNS_PREFIX, STATUS_PREFIX, LOGS_PREFIX)):
                survey.last_run = max(survey.last_run, run_of_key(info.key) or 0)
            elif info.key.startswith(f"{META}/"):
                continue
            elif f"/{META}/" in info.key:
                folder, _, rest = info.key.partition(f"/{META}/")
                if not f"{META}/{rest}".startswith(LEASES_PREFIX):  # a refused start leaves those
                    survey.nested.add(folder)
            elif info.key.endswith(".parquet"):
                survey.finished.add(info.key)
        of_others = tuple(f"{folder}/" for folder in survey.nested)
        survey.finished = {key for key in survey.finished if not key.startswith(of_others)}
        return survey

    def parts_of(self, shard: str) -> list[PartId]:
        """The shard's parts in fold order, listed afresh."""
        parsed = (parse_part_key(info.key) for info in self._store.list(parts_prefix(shard)))
        return sorted(part for found in parsed if found is not None for _, part in [found])

    def keys_of_parts(self, shard: str, parts: Iterable[PartId]) -> Keys:
        """Keys held by parts of the shard.

        An unreadable or foreign part is set aside with a warning.
        """
        if self._store.is_local:
            return concat_keys([self._keys_of_part(shard, part) for part in parts])
        with ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="keys") as pool:
            return concat_keys(list(pool.map(lambda part: self._keys_of_part(shard, part), parts)))

    def _keys_of_part(self, shard: str, part: PartId) -> Keys:
        try:
            with self._open(part_key(shard, part)) as source:
                file = pq.ParquetFile(source, pre_buffer=False)
                why = self._why_foreign_part(file_facts(file.metadata), shard, part)
                if why is None:
                    return read_keys(file)
                problem = why
        except FileNotFoundError:
            return concat_keys([])  # its run, or another, has just folded it
        except (pa.ArrowInvalid, OSError) as error:
            problem = str(error).splitlines()[0]
        self.set_aside(shard, part, problem)
        return concat_keys([])

    def num_rows_of_parts(self, shard: str) -> int:
        """Results in the shard's parts, from their footers (a result in two parts counts twice)."""
        num_rows = 0
        for part in self.parts_of(shard):
            with (
                contextlib.suppress(FileNotFoundError, pa.ArrowInvalid),
                self._open(part_key(shard, part)) as source,
            ):
                num_rows += pq.read_metadata(source).num_rows
        return num_rows

    def keys_of_finished(self, shard: str) -> Keys:
        """Keys in the shard's finished file. Raises FileNotFoundError, ConfigError if it is not."""
        with self._open(shard) as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            self._finished_facts(shard, file_facts(file.metadata))
            return read_keys(file)

    def facts_of(self, key: str) -> dict[str, Any] | None:
        """Our facts in a Parquet file's footer, None if it is not ours.

        Raises FileNotFoundError.
        """
        with self._open(key) as source:
            try:
                return file_facts(pq.read_metadata(source))
            except pa.ArrowInvalid:
                return None

    def schema_of(self, key: str) -> pa.Schema:
        """Columns of a Parquet file, none if it is no such file. Raises FileNotFoundError."""
        with self._open(key) as source:
            try:
                return pq.read_schema(source)
            except pa.ArrowInvalid:
                return pa.schema([])

    def totals_of(self, shard: str) -> Totals:
        """Totals in the footer of the shard's finished file. Raises ConfigError if it is not."""
        return Totals.from_facts(self._finished_facts(shard, self.facts_of(shard)))

    def _finished_facts(self, shard: str, facts: dict[str, Any] | None) -> dict[str, Any]:
        """`facts` of the file at the shard's place, if it is the shard's finished file."""
        if not self._is_ours(facts) or facts is None or "rows_failed" not in facts:
            problem = "is not a result of this job"
        elif facts.get("shard") != shard:
            problem = f"is the finished file of {facts.get('shard')}, not of {shard}"
        else:
            return facts
        raise ConfigError(
            f"{self._store.url_of(shard)} {problem}: move it away and start again, its rows are "
            "computed anew"
        )

    def set_aside(self, shard: str, part: PartId, problem: str) -> None:
        """Move a part out of the way (and keep it): its rows count as not done."""
        key = part_key(shard, part)
        aside = UNREADABLE_PREFIX + key.removeprefix(PARTS_PREFIX)
        logger.warning(
            "part %s cannot be used (%s): moved to %s, its rows are computed again",
            self._store.url_of(key),
            problem,
            aside,
        )
        try:
            self._store.put(aside, self._store.read(key))
        except FileNotFoundError:
            return
        self._store.delete([key])

    def publish_part(self, shard: str, part: PartId, table: pa.Table) -> None:
        """Make finished rows of one window durable. `table` is sorted by (row, sample)."""
        facts = {**self._facts, "shard": shard, "window": part.window, "run": part.run}
        key = part_key(shard, part)
        self.check()
        self._store.publish(key, lambda sink: write_table(sink, table, facts))
        try:
            self.check()
        except TransientError:
            self._store.delete([key])
            raise

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
                raise IncompleteShard(f"{shard}: {have} results for {num_expected} expected")
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
        for _ in range(_MAX_FOLD_TRIES):
            self.check()
            parts = self.parts_of(shard)
            try:
                parts = self._merge_many(shard, schema, parts, check)
                totals = self._fold(shard, schema, parts, num_expected, recheck, check)
            except FileNotFoundError:
                continue  # a part vanished: somebody else finished this shard. Look again.
            except _UnreadablePart as error:
                self.set_aside(shard, error.part, str(error))
                continue
            self._store.delete([part_key(shard, part) for part in parts])
            return totals
        raise TransientError(
            f"{self._store.url_of(shard)}: its parts kept vanishing while they were folded. "
            "Another run seems to work on this output; start again when it has ended"
        )

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
            self._store.delete([part_key(shard, part) for part in parts])
            return
        with self._open(shard) as source:
            schema = pq.read_schema(source).remove_metadata()
        counts = np.bincount(finished.row // self._window_rows)
        self.finish_shard(shard, schema, counts.tolist(), lambda: None)

    def _fold(
        self,
        shard: str,
        schema: pa.Schema,
        parts: Sequence[PartId],
        num_expected: Sequence[int],
        recheck: Callable[[], None],
        check: Callable[[], None],
    ) -> Totals:
        inherited: dict[str, Any] = {}
        if "engine" not in self._facts and parts:
            # Nothing was computed in this run: say which engine the last part came from.
            last = self.facts_of(part_key(shard, parts[-1]))
            inherited = {"engine": (last or {}).get("engine")}
        parts_of_window = {w: list(group) for w, group in groupby(parts, key=lambda p: p.window)}

        def tables() -> Iterator[pa.Table]:
            with ExitStack() as files:
                finished = self._finished_cursor(shard, files)
                num_windows = max([len(num_expected), *(w + 1 for w in parts_of_window)])
                for window in range(num_windows):
                    expected = num_expected[window] if window < len(num_expected) else 0
                    have = 0
                    for table in self._fold_one_window(
                        shard, window, parts_of_window.get(window, []), finished
                    ):
                        have += table.num_rows
                        yield table
                        check()
                    if have != expected:
                        raise IncompleteShard(
                            f"{self._store.url_of(shard)}: window {window} has {have} results "
                            f"where {expected} are due, so the finished file was not written. "
                            "Start again: what is missing is computed"
                        )

        return self._publish_finished(shard, schema, tables, inherited, recheck)

    def _merge_many(
        self,
        shard: str,
        schema: pa.Schema,
        parts: Sequence[PartId],
        check: Callable[[], None],
    ) -> list[PartId]:
        """Replace the parts of a window that has very many by fewer: a fold opens them all at once.

        The merged part is published before its sources are deleted, so a kill in between leaves
        results twice, of which the fold takes the earlier.
        """
        if self.run == 0:
            return list(parts)
        remaining: list[PartId] = []
        for window, group in groupby(parts, key=lambda part: part.window):
            waiting = list(group)
            max_open = _max_open_parts()
            while len(waiting) > max_open:
                sources, waiting = waiting[:max_open], waiting[max_open:]
                self._num_merged += 1
                merged = PartId(window, self.run, _FIRST_MERGED + self._num_merged)
                self._merge(shard, schema, sources, merged)
                waiting.append(merged)
                check()
            remaining += waiting
        return remaining

    def _merge(
        self, shard: str, schema: pa.Schema, sources: Sequence[PartId], merged: PartId
    ) -> None:
        facts = {**self._facts, "shard": shard, "window": merged.window, "run": merged.run}

        def write(sink: BinaryIO) -> None:
            with part_writer(sink, schema) as writer:
                for table in self._fold_one_window(shard, merged.window, sources, None):
                    written = cast_table(table, schema)
                    writer.write_table(written, row_group_size=max(1, table.num_rows))
                writer.add_key_value_metadata({FACTS_KEY: json.dumps(facts)})

        self._store.publish(part_key(shard, merged), write)
        self._store.delete([part_key(shard, part) for part in sources])

    def _fold_one_window(
        self, shard: str, window: int, parts: Sequence[PartId], finished: Cursor | None
    ) -> Iterator[pa.Table]:
        with ExitStack() as files:
            cursors = [finished] if finished is not None else []
            batch_bytes = batch_bytes_of(len(parts))
            try:
                for rank, part in enumerate(parts, start=1):
                    source = self._open(part_key(shard, part))
                    files.callback(source.close)
                    cursors.append(Cursor(source, rank=rank, batch_bytes=batch_bytes))
                    why = self._why_foreign_part(cursors[-1].facts, shard, part)
                    if why is not None:
                        raise UnreadableSource(rank, why)
                start = window * self._window_rows
                stop = start + self._window_rows
                yield from fold_window(cursors, start, stop, num_samples=self._num_samples)
            except UnreadableSource as error:
                if error.rank == 0:
                    raise self._unreadable_finished(shard, error) from error
                raise _UnreadablePart(parts[error.rank - 1], str(error)) from error

    def _finished_cursor(self, shard: str, files: ExitStack) -> Cursor | None:
        try:
            source = self._open(shard)
            files.callback(source.close)
            cursor = Cursor(source, rank=0, batch_bytes=batch_bytes_of(1))
        except FileNotFoundError:
            return None
        except UnreadableSource as error:
            raise self._unreadable_finished(shard, error) from error
        self._finished_facts(shard, cursor.facts)
        return cursor

    def _unreadable_finished(self, shard: str, error: UnreadableSource) -> TransientError:
        return TransientError(
            f"{self._store.url_of(shard)}: the finished file cannot be read ({error}). "
            "Remove it and start again: its rows are computed anew"
        )

    def _publish_finished(
        self,
        shard: str,
        schema: pa.Schema,
        tables: Callable[[], Iterator[pa.Table]],
        inherited: Mapping[str, Any],
        recheck: Callable[[], None],
    ) -> Totals:
        totals = Totals()

        def write(sink: BinaryIO) -> None:
            nonlocal totals
            totals = Totals()
            with part_writer(sink, schema) as writer:
                for table in tables():
                    totals += count_results(table, has_schema=self._has_schema)
                    written = cast_table(table, schema)
                    writer.write_table(written, row_group_size=max(1, table.num_rows))
                facts = {**self._facts, **inherited, "shard": shard, **totals.as_dict()}
                writer.add_key_value_metadata({FACTS_KEY: json.dumps(facts)})
            recheck()
            self.check()

        self._store.publish(shard, write)
        return totals

    def _open(self, key: str) -> BinaryIO:
        return self._store.open(key)

    def _is_ours(self, facts: Mapping[str, Any] | None) -> bool:
        return facts is not None and facts.get("digest") == self._facts["digest"]

    def _why_foreign_part(
        self, facts: Mapping[str, Any] | None, shard: str, part: PartId
    ) -> str | None:
        if not self._is_ours(facts) or facts is None:
            return "it belongs to another job"
        if facts.get("shard") != shard or facts.get("window") != part.window:
            return f"it belongs to window {facts.get('window')} of {facts.get('shard')}"
        return None


class _UnreadablePart(Exception):
    def __init__(self, part: PartId, problem: str) -> None:
        super().__init__(problem)
        self.part = part


def _max_open_parts() -> int:
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_open = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return MAX_OPEN_PARTS
    return max(2, min(MAX_OPEN_PARTS, soft - num_open - _FILES_BESIDE_PARTS))


def count_results(table: pa.Table, *, has_schema: bool) -> Totals:
    """`has_schema`: each result is to be a JSON document; `parsed` has those that are whole."""
    num_failed = table.num_rows - table.column("error_type").null_count
    return Totals(
        rows=table.num_rows,
        rows_failed=num_failed,
        prompt_tokens=pc.sum(table.column("num_prompt_tokens")).as_py() or 0,
        completion_tokens=pc.sum(table.column("num_completion_tokens")).as_py() or 0,
        rows_cut=pc.sum(pc.equal(table.column("finish_reason"), "length")).as_py() or 0,
        rows_unparsed=table.column("parsed").null_count - num_failed if has_schema else 0,
    )
