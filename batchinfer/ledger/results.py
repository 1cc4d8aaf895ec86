"""What is done in an output, read from the parts and finished files themselves.

Must not know: engines, prompts, threads (its methods may be called from several). Writes nothing,
except that a part that cannot be used is moved out of the way.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import ConfigError
from batchinfer.ledger.keys import Keys, concat_keys, read_keys
from batchinfer.ledger.layout import (
    PARTS_PREFIX,
    UNREADABLE_PREFIX,
    PartId,
    parse_part_key,
    part_key,
    parts_prefix,
)
from batchinfer.ledger.records import Totals
from batchinfer.sink import file_facts
from batchinfer.storage import Store

logger = logging.getLogger("batchinfer.ledger")

_REMOTE_READS = 16  # requests for parts that are under way together; a wait each


def read_facts(store: Store, key: str) -> dict[str, Any] | None:
    """Our facts in a Parquet file's footer, None if it is not ours.

    Raises FileNotFoundError.
    """
    with store.open(key) as source:
        try:
            return file_facts(pq.read_metadata(source))
        except pa.ArrowInvalid:
            return None


def read_schema(store: Store, key: str) -> pa.Schema:
    """Columns of a Parquet file, none if it is not one. Raises FileNotFoundError."""
    with store.open(key) as source:
        try:
            return pq.read_schema(source)
        except pa.ArrowInvalid:
            return pa.schema([])


def damaged(url: str, error: Exception) -> ConfigError:
    """Of a file of results that is to be read, and cannot be. Unlike storage that is down, this
    does not heal.
    """
    problem = str(error).partition("\n")[0]
    return ConfigError(
        f"{url} is damaged: {problem}. Move it away and start again: its rows are computed again"
    )


@contextlib.contextmanager
def named_if_damaged(url: str) -> Iterator[None]:
    """While a file of results is read: ConfigError where it is no Parquet file or breaks off."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise damaged(url, error) from error


def list_parts(store: Store, shard: str) -> list[PartId]:
    """The shard's parts in fold order, listed afresh.

    Its folder may have those of others below it: `a.parquet` beside `a.parquet.parts/b.parquet`.
    """
    listed = store.list(parts_prefix(shard), recursive=False)
    parsed = (parse_part_key(info.key) for info in listed)
    return sorted(part for name, part in filter(None, parsed) if name == shard)


class Results:
    """The parts and finished files of one output, for reading.

    `digest`: in every footer of this output; a part with another belongs to another job.
    """

    def __init__(self, store: Store, digest: str) -> None:
        self._store = store
        self._digest = digest

    @property
    def store(self) -> Store:
        return self._store

    def parts_of(self, shard: str) -> list[PartId]:
        """The shard's parts in fold order, listed afresh."""
        return list_parts(self._store, shard)

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
            with self._store.open(part_key(shard, part)) as source:
                file = pq.ParquetFile(source, pre_buffer=False)
                why = self.why_foreign_part(file_facts(file.metadata), shard, part)
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
                self._store.open(part_key(shard, part)) as source,
            ):
                num_rows += pq.read_metadata(source).num_rows
        return num_rows

    def keys_of_finished(self, shard: str) -> Keys:
        """Keys in the shard's finished file. Raises FileNotFoundError, ConfigError if it is not."""
        with self._store.open(shard) as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            self.finished_facts(shard, file_facts(file.metadata))
            return read_keys(file)

    def totals_of(self, shard: str) -> Totals:
        """Totals in the footer of the shard's finished file. Raises ConfigError if it is not."""
        return Totals.from_facts(self.finished_facts(shard, read_facts(self._store, shard)))

    def finished_facts(self, shard: str, facts: dict[str, Any] | None) -> dict[str, Any]:
        """`facts` of the file at the shard's place; ConfigError unless it is its finished file."""
        if not self._is_ours(facts) or facts is None or "rows_failed" not in facts:
            problem = "is not a result of this job"
        elif facts.get("shard") != shard:
            problem = f"is the finished file of {facts.get('shard')}, not of {shard}"
        else:
            return facts
        raise ConfigError(
            f"{self._store.url_of(shard)} {problem}: move it away and start again, its rows are "
            "computed again"
        )

    def why_foreign_part(
        self, facts: Mapping[str, Any] | None, shard: str, part: PartId
    ) -> str | None:
        """Why a part with these facts is not one of this place; None if it is."""
        if not self._is_ours(facts) or facts is None:
            return "it belongs to another job"
        if facts.get("shard") != shard or facts.get("window") != part.window:
            return f"it belongs to window {facts.get('window')} of {facts.get('shard')}"
        return None

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

    def _is_ours(self, facts: Mapping[str, Any] | None) -> bool:
        return facts is not None and facts.get("digest") == self._digest
