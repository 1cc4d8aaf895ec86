"""The id and kept columns, on their way from the input to the output.

Their types are those of all shards together, so that all files of an output have one schema; it is
settled when the output is begun, is in job.json, and holds from then on. Must not know: files
of the output, leases. Outputs of versions without it go on with each shard's own types.
"""

from __future__ import annotations

import base64
import binascii
import logging
import threading
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa

from batchinfer.config import Job
from batchinfer.errors import ConfigError, InputError
from batchinfer.source import (
    Block,
    Footer,
    Shard,
    cast_column,
    common_field,
    is_finer,
    output_field,
    takes,
    with_valid_text,
)

logger = logging.getLogger("batchinfer.runner")

#: In job.json: the Arrow schema, as bytes of its IPC format in base64.
RECORD_KEY = "carried_schema"


def carried_columns(job: Job, footer: Footer) -> pa.Schema:
    """What a shard has of the columns: `id` first, then the kept ones."""
    columns = {"id": job.input.id_column} | {name: name for name in job.input.keep_columns}
    return pa.schema(
        [
            pa.field(name, pa.string())
            if column is None or column in footer.partitions
            else output_field(name, footer.arrow_schema.field(column))
            for name, column in columns.items()
        ]
    )


def carried_schema(
    job: Job, shards: Iterable[tuple[Shard, pa.Schema]], record: Mapping[str, Any] | None
) -> pa.Schema | None:
    """The one schema of the columns for these shards and what the output was begun with.

    `record`: its job.json. None: it was begun without one, and each file has its shard's. Raises
    InputError for types that have none in common.
    """
    if record is not None and RECORD_KEY not in record:
        return None
    begun = _from_text(record[RECORD_KEY]) if record is not None else None
    fields = list(begun or ())
    firsts: list[list[tuple[pa.Field, Shard]]] = []  # of each column: types, and who has them
    problems = []
    for shard, schema in shards:
        if not firsts:
            fields = fields or list(schema)
            firsts = [[(field, shard)] for field in schema]
        for index, field in enumerate(schema):
            common = common_field(fields[index], field)
            if common is None or (
                begun is not None and not takes(begun.field(index).type, field.type)
            ):
                problems.append(_problem(job, field, shard, begun, firsts[index]))
            elif common.type != fields[index].type:
                firsts[index].append((field, shard))
            if begun is None:  # else the output's files have what it says, metadata too
                fields[index] = common or fields[index]
    if problems:
        raise InputError("\n".join(problems[:20]))
    if begun is None:
        _tell_of_zones(fields, firsts)
    return pa.schema(fields)


def _tell_of_zones(
    fields: Iterable[pa.Field], firsts: Iterable[Iterable[tuple[pa.Field, Shard]]]
) -> None:
    for field, found in zip(fields, firsts, strict=True):
        zones = {one.type.tz: shard.url for one, shard in found if pa.types.is_timestamp(one.type)}
        if len(zones) > 1:
            named = ", ".join(f"{zone} in {url}" for zone, url in islice(zones.items(), 3))
            logger.warning(
                "%s: the input's time zones differ (%s): the output has the same instants in %s",
                field.name,
                named,
                field.type.tz,
            )


def _problem(
    job: Job,
    field: pa.Field,
    shard: Shard,
    begun: pa.Schema | None,
    others: Iterable[tuple[pa.Field, Shard]],
) -> str:
    is_id = field.name == "id"
    key = "input.id_column" if is_id else "input.keep_columns"
    what = f"{key}: {job.input.id_column if is_id else field.name!r} is {field.type} in {shard.url}"
    if begun is not None:
        return (
            f"{what}, and {begun.field(field.name).type} in the output, which cannot hold that: "
            "write the file with that type, or choose another output.path"
        )
    other = next((o for o in others if common_field(o[0], field) is None), None)
    there = f"{other[0].type} in {other[1].url}" if other else "of several types in others"
    return (
        f"{what} and {there}: no type of the output has the values of both. Write the files with "
        f"one type{'' if is_id else ', or do not keep the column'}"
    )


def to_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize()).decode()


def recorded_schema(record: Mapping[str, Any]) -> pa.Schema | None:
    """The columns as job.json has them; None: it was begun without them."""
    return _from_text(record[RECORD_KEY]) if RECORD_KEY in record else None


def _from_text(text: str) -> pa.Schema:
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
    except (pa.ArrowException, OSError, TypeError, binascii.Error) as error:
        raise ConfigError(
            f"job.json of the output is damaged: {RECORD_KEY} cannot be read ({error}). Remove it "
            "and start again: results are kept, and its content is recovered from them"
        ) from error


class Carrier:
    """Takes the columns of rows that are read to their output types. Any thread may call it."""

    def __init__(self, job: Job, schema: pa.Schema | None) -> None:
        """`schema` None: each shard's own types."""
        self._id_column = job.input.id_column
        self._kept = job.input.keep_columns
        self._schema = schema
        self._lock = threading.Lock()
        self._is_told = False  # of text that is not UTF-8
        self._shortened: set[str] = set()  # columns whose nanoseconds are left out

    def fields(self, shard_schema: pa.Schema) -> list[pa.Field]:
        """The output's fields for a shard with these columns."""
        if self._schema is not None:
            return list(self._schema)
        id_type = shard_schema.field(self._id_column).type if self._id_column else pa.string()
        kept = [pa.field(name, shard_schema.field(name).type) for name in self._kept]
        return [pa.field("id", id_type), *kept]

    def table(self, shard: Shard, block: Block) -> pa.Table:
        """The columns of the rows of a block. Raises InputError for a value that no type takes."""
        if self._id_column:
            ids = block.table.column(self._id_column)
        else:
            texts = [f"{shard.name}:{row}" for row in block.rows.tolist()]
            ids = pa.chunked_array([pa.array(texts, pa.string())])
        columns = {"id": ids} | {name: block.table.column(name) for name in self._kept}
        fields = self.fields(block.table.schema)
        return pa.table(
            [self._column(field, columns[field.name], shard, block) for field in fields],
            schema=pa.schema(fields),
        )

    def _tell_of_digits(self, field: pa.Field, where: str) -> None:
        with self._lock:
            is_told = field.name in self._shortened
            self._shortened.add(field.name)
        if not is_told:
            logger.warning(
                "column %r has nanoseconds, first in %s, and the output has it in %s because other "
                "files have it in a coarser unit: digits below that are left out",
                field.name,
                where,
                field.type,
            )

    def _column(
        self, field: pa.Field, column: pa.ChunkedArray, shard: Shard, block: Block
    ) -> pa.ChunkedArray:
        valid, is_mended = with_valid_text(column)
        where = f"{shard.url}, rows {block.rows[0]} to {block.rows[-1]}"
        if is_mended:
            with self._lock:
                is_told, self._is_told = self._is_told, True
            if not is_told:
                logger.warning(
                    "column %r has text that is not UTF-8, first in %s: invalid bytes are "
                    "written as \N{REPLACEMENT CHARACTER} (U+FFFD)",
                    field.name,
                    where,
                )
        try:
            return cast_column(valid, field.type)
        except pa.ArrowException as error:
            if is_finer(valid.type, field.type):
                self._tell_of_digits(field, where)
                return valid.cast(field.type, safe=False)
            raise InputError(
                f"{where}: column {field.name!r} cannot be {field.type}, its type in the output: "
                f"{error}. Write all input files with one type of this column, and choose another "
                "output.path"
            ) from error
