"""A shard's footer: row count, schema, row groups, and a hash that changes with the content.

Must not know: rows. One read of the file's end gives all of it; what is not a whole Parquet file is
refused here with its name, before anything is computed.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import InputError
from batchinfer.source.partitions import says_other
from batchinfer.source.plain import plain_column, plain_field
from batchinfer.source.shards import Shard

_MAGIC = b"PAR1"
_ENCRYPTED_MAGIC = b"PARE"
_SIGNATURE_BYTES = 28  # nonce and tag that follow a plain footer where columns are encrypted
_TAIL_BYTES = 64 * 1024  # holds most footers, so that one request is enough
_MAX_NAMED_COLUMNS = 40
_NUM_END_BYTES = 8  # length of the footer, magic


#: Of the timestamps of Spark, Hive and Impala. In nanoseconds, which is Arrow's default, a date
#: before 1677 or after 2262 becomes another without an error; 9999-12-31 is their "for ever".
INT96_UNIT = "us"


@dataclass(frozen=True, slots=True)
class RowGroup:
    first_row: int
    num_rows: int
    size_bytes: int  # uncompressed


@dataclass(frozen=True, slots=True)
class Footer:
    """What the end of a shard says. `schema` has plain types; `partitions` are the folders that are
    columns, whether or not `schema` has them too.

    Of `metadata` no column chunk may be asked for: pyarrow ends the process, without an exception,
    where that is encrypted or damaged.
    """

    num_rows: int
    schema: pa.Schema
    arrow_schema: pa.Schema  # as its writer had it
    partitions: Mapping[str, str]
    row_groups: tuple[RowGroup, ...]
    sha256: str
    metadata: pq.FileMetaData
    has_encrypted_columns: bool
    num_named: Mapping[str, int]  # how many columns of the file have a name


def read_footer(shard: Shard) -> Footer:
    """Raises InputError if the shard is gone, changed since it was listed, torn or not Parquet."""
    with open_shard(shard) as file:
        return parse_footer(file, shard)


def open_shard(shard: Shard) -> BinaryIO:
    try:
        return shard.store.open(shard.key)
    except FileNotFoundError:
        raise InputError(f"{shard.url} vanished since the input was listed") from None


def parse_footer(file: BinaryIO, shard: Shard) -> Footer:
    """The footer of an open shard."""
    footer_bytes = _footer_bytes(file, shard)
    tail = len(footer_bytes).to_bytes(4, "little") + _MAGIC
    try:
        # Only the footer is parsed, so the row groups need not be in front of it.
        parsed = pq.ParquetFile(
            pa.BufferReader(_MAGIC + footer_bytes + tail), coerce_int96_timestamp_unit=INT96_UNIT
        )
        schema = parsed.schema_arrow
        names = schema.names
    except pa.ArrowNotImplementedError as error:
        raise InputError(
            f"{shard.url} has a column of a type that pyarrow lacks: {error}"
        ) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if "too deeply nested" in str(error):
            raise InputError(
                f"{shard.url} has a column that is nested too deeply to be read "
                f"(pyarrow: {error}): write the file without it"
            ) from error
        raise InputError(f"{shard.url}: the Parquet footer is damaged: {error}") from error
    metadata = parsed.metadata
    row_groups = _row_groups(metadata)
    if metadata.num_rows != sum(group.num_rows for group in row_groups):
        raise InputError(f"{shard.url}: the Parquet footer is damaged: its row counts disagree")
    outer = {name: value for name, value in shard.outer_partitions if name not in names}
    return Footer(
        num_rows=metadata.num_rows,
        schema=pa.schema(
            [plain_field(name, kind) for name, kind in zip(names, schema.types, strict=True)]
        ),
        arrow_schema=schema,
        partitions=outer | dict(shard.partitions),
        row_groups=row_groups,
        sha256=hashlib.sha256(footer_bytes).hexdigest(),
        metadata=metadata,
        has_encrypted_columns=len(footer_bytes) - metadata.serialized_size == _SIGNATURE_BYTES,
        num_named=Counter(names),
    )


def check_columns(footer: Footer, needed: Sequence[str], shard: Shard) -> None:
    """Raise InputError unless the shard (or its folders) has each needed column exactly once, and
    can be read.
    """
    for name in needed:
        if problem := column_problem(footer, name):
            raise InputError(f"shard {shard.url}: {problem}")
    folders = (*shard.outer_partitions, *shard.partitions)
    for name in needed:
        own = shard.partitions if name in footer.num_named else folders
        values = {value for key, value in own if key == name}
        if len(values) > 1:
            raise InputError(
                f"the folders of {shard.url} give {name!r} {len(values)} values "
                f"({', '.join(sorted(values))}): rename one of them"
            )
    in_file = [name for name in needed if name in footer.num_named]
    of_both = [name for name in in_file if name in footer.partitions]
    stored = in_file if footer.has_encrypted_columns else of_both
    if stored:
        _check_first_row(footer, stored, shard)


def column_problem(footer: Footer, name: str) -> str | None:
    """Why the shard (or its folders) does not have this column exactly once; None if it does."""
    count = footer.num_named.get(name, 0)
    if not count and name not in footer.partitions:
        available = list(dict.fromkeys([*footer.schema.names, *footer.partitions]))
        close = difflib.get_close_matches(name, available, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        shown = ", ".join(available[:_MAX_NAMED_COLUMNS]) or "none"
        if (num_more := len(available) - _MAX_NAMED_COLUMNS) > 0:
            shown += f" and {num_more:,} more"
        return f"there is no column {name!r}{hint}; the columns are {shown}"
    if count > 1:
        return f"there are {count} columns named {name!r}: rename them"
    if count and _has_lists_of_none(footer.schema.field(name).type):
        return (
            f"column {name!r} has lists of the fixed size 0, which pyarrow writes and cannot read: "
            "write the file without it"
        )
    return None


def _has_lists_of_none(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(kind) and kind.list_size == 0:
        return True
    return any(_has_lists_of_none(kind.field(index).type) for index in range(kind.num_fields))


def check_partition(name: str, value: str, column: pa.ChunkedArray, shard: Shard) -> None:
    """Raise InputError if a column of the file has other values than the folder of its name."""
    where = f"{shard.url}: column {name!r} in the file"
    try:
        if not says_other(value, column):
            return
        problem = f"{where} has other values than its folder {name}={value}"
    except ValueError:
        problem = f"{where} is {column.type}, which its folder {name}={value} is not"
    raise InputError(f"{problem}: rename the column or the folder")


def _check_first_row(footer: Footer, names: Sequence[str], shard: Shard) -> None:
    """Checks that need values: which columns are encrypted, and whether folders agree with them."""
    filled = [index for index, group in enumerate(footer.row_groups) if group.num_rows][:1]
    encrypted = []
    with open_shard(shard) as source:
        file = pq.ParquetFile(
            source,
            metadata=footer.metadata,
            pre_buffer=False,
            coerce_int96_timestamp_unit=INT96_UNIT,
        )
        for name in names:
            try:
                batch = next(file.iter_batches(1, row_groups=filled, columns=[name]), None)
            except (pa.ArrowException, OSError) as error:
                if not footer.has_encrypted_columns:
                    raise InputError(
                        f"{shard.url}: column {name!r} cannot be read: {error}"
                    ) from error
                encrypted.append(name)
                continue
            if name in footer.partitions:
                kind = footer.schema.field(name).type
                values = pa.nulls(0, kind) if batch is None else batch.column(0)
                first = plain_column(pa.chunked_array([values]))
                check_partition(name, footer.partitions[name], first, shard)
    if encrypted:
        raise InputError(
            f"shard {shard.url} has encrypted columns: {', '.join(encrypted)} cannot be read. "
            "Rewrite the file without encryption, or leave them out of the job"
        )


def _footer_bytes(file: BinaryIO, shard: Shard) -> bytes:
    size_bytes = file.seek(0, 2)
    if size_bytes != shard.size_bytes:
        raise InputError(
            f"{shard.url} changed while it was read: {shard.size_bytes} bytes when the input was "
            f"listed, {size_bytes} bytes now. Start again once nothing writes to it"
        )
    if size_bytes == 0:
        raise InputError(f"{shard.url} is empty (0 bytes), not a Parquet file")
    file.seek(max(0, size_bytes - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if tail[-4:] == _ENCRYPTED_MAGIC:
        raise InputError(f"{shard.url} is an encrypted Parquet file: decrypt it first")
    if tail[-4:] != _MAGIC or size_bytes < len(_MAGIC) + _NUM_END_BYTES:
        file.seek(0)
        if file.read(len(_MAGIC)) == _MAGIC:
            raise InputError(
                f"{shard.url} is truncated: it begins as a Parquet file, but has no footer at its "
                "end. Copy it again or rewrite it"
            )
        raise InputError(f"{shard.url} is not a Parquet file (it does not begin with PAR1)")
    num_footer_bytes = int.from_bytes(tail[-_NUM_END_BYTES:-4], "little")
    footer_start = size_bytes - _NUM_END_BYTES - num_footer_bytes
    if footer_start < len(_MAGIC):
        raise InputError(
            f"{shard.url} is truncated: its footer should have {num_footer_bytes} bytes, "
            f"the whole file has {size_bytes}. Copy it again or rewrite it"
        )
    if num_footer_bytes + _NUM_END_BYTES > len(tail):
        file.seek(footer_start)
        return file.read(num_footer_bytes)
    return tail[-_NUM_END_BYTES - num_footer_bytes : -_NUM_END_BYTES]


def _row_groups(metadata: pq.FileMetaData) -> tuple[RowGroup, ...]:
    groups = []
    first_row = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        groups.append(RowGroup(first_row, group.num_rows, group.total_byte_size))
        first_row += group.num_rows
    return tuple(groups)
