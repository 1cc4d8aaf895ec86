"""The id column of a whole input: how many ids are null, and which occur more than once.

Must not know: outputs, who asks. Memory: 8 bytes a row (a hash of each id).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.source import (
    Shard,
    ShardReader,
    cast_column,
    plain_type,
    type_for_polars,
    with_valid_text,
)

if TYPE_CHECKING:
    import polars as pl

_MAX_PLACES = 20


@dataclass(frozen=True, slots=True)
class IdsFound:
    """`places`: the first of repeated ids, as "shard:row id"."""

    num_nulls: int
    num_repeated: int  # values
    places: Sequence[str]


def look_at_ids(shards: Sequence[Shard], column: str, carried: pa.Schema | None) -> IdsFound | None:
    """Read `column` of all shards; None if they have no row. `carried`: the output's schema of it.

    Raises InputError for ids of a type that cannot be compared.
    """
    hashes = []
    num_nulls = 0
    for _, _, ids in _blocks(shards, column, carried):
        num_nulls += ids.null_count()
        hashes.append(ids.drop_nulls().hash().to_numpy())
    if not hashes:
        return None
    unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = unique[counts > 1]
    places = _places_of(shards, column, carried, repeated) if len(repeated) else []
    return IdsFound(num_nulls, len(repeated), places)


def _blocks(
    shards: Sequence[Shard], column: str, carried: pa.Schema | None
) -> Iterator[tuple[Shard, npt.NDArray[np.int64], pl.Series]]:
    """(shard, row numbers, ids) of all rows."""
    for shard in shards:
        with ShardReader(shard, [column], None) as reader:
            for block in reader.blocks(0, reader.num_rows):
                yield shard, block.rows, _comparable(block.table.column(column), carried)


def _comparable(ids: pa.ChunkedArray, carried: pa.Schema | None) -> pl.Series:
    """Ids in the type that all shards have in common, where polars knows it, else as text."""
    import polars as pl

    kind = plain_type(carried.field("id").type) if carried is not None else ids.type
    try:
        values = cast_column(ids, kind)
        is_text = pa.types.is_temporal(kind) or pa.types.is_decimal(kind)
        values = cast_column(values, pa.string() if is_text else type_for_polars(kind))
        return pl.Series(with_valid_text(values)[0])
    except (
        ValueError,
        pa.ArrowException,
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
    ) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--ids: ids of the type {kind} cannot be compared: {reason}") from None


def _places_of(
    shards: Sequence[Shard],
    column: str,
    carried: pa.Schema | None,
    repeated: npt.NDArray[np.uint64],
) -> list[str]:
    places: list[str] = []
    for shard, rows, ids in _blocks(shards, column, carried):
        is_repeated = np.isin(ids.hash().to_numpy(), repeated) & ids.is_not_null().to_numpy()
        for index in np.flatnonzero(is_repeated).tolist():
            places.append(f"{shard.name}:{int(rows[index])} {ids[index]!r}")
            if len(places) == _MAX_PLACES:
                return [*places, "…"]
    return places
