"""The lines of a batch file, or the rows of a Parquet file with the same four columns.

Must not know: what is asked in a body. Invariant: whatever a line is, it comes out once, in order,
with a request or with the reason why it is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import InputError, printable
from batchinfer.storage.local_errors import os_errors

COLUMNS = ("custom_id", "method", "url", "body")

#: Of a body: more than anything that is meant. What reads a schema is recursive.
MAX_DEPTH = 64
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a line has no answer, as OpenAI's errors say it. `param`: the key of the body."""

    message: str
    code: str
    param: str | None = None
    status: int = 400


class LineError(Exception):
    """A line that cannot be asked. Becomes output, never an exit."""

    def __init__(
        self, message: str, code: str, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        param = None if param is None else printable(param)
        self.refusal = Refusal(printable(message), code, param, status)


@dataclass(frozen=True, slots=True)
class Line:
    """`custom_id` None: the line does not say it. `refusal` None: there are `url` and `body`."""

    number: int  # from 1
    custom_id: str | None
    url: str
    body: Mapping[str, Any]
    refusal: Refusal | None = None


def no_data_of_a_line(value: Any) -> str | None:
    """What makes a value one that no line of a batch file can hold; None: nothing."""
    left: list[tuple[Any, int]] = [(value, 0)]
    while left:
        some, depth = left.pop()
        if depth > MAX_DEPTH:
            return f"has values in values more than {MAX_DEPTH} deep"
        match some:
            case str() as text:
                try:
                    text.encode()
                except UnicodeEncodeError as error:  # "\\ud83d" without its other half
                    return f"is not valid text: half a character (at {error.start + 1})"
            case dict() as mapping:
                left += [(one, depth + 1) for one in (*mapping, *mapping.values())]
            case list() as values:
                left += [(one, depth + 1) for one in values]
            case None | bool() | int() | float():
                pass
            case other:
                return f"holds a {type(other).__name__}, which JSON does not have"
    return None


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A batch file that is open: what `sha256` is of is what its lines are read from."""

    path: Path
    content: BufferedReader
    sha256: str  # what a batch is known by


@contextmanager
def opened(path: Path) -> Iterator[BatchFile]:
    """Opened once, so a pipe will do: it is copied. Raises InputError for what is not there."""
    with ExitStack() as stack:
        try:
            with os_errors("read", path):
                content: BufferedReader = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            raise InputError(f"there is no input file {path}") from None
        if not stat.S_ISREG(os.fstat(content.fileno()).st_mode):
            copy: Any = stack.enter_context(tempfile.TemporaryFile())
            with os_errors("copy", path):
                shutil.copyfileobj(content, copy)
                copy.flush()
            content = copy
        yield BatchFile(path, content, _sha256(path, content))


def _sha256(path: Path, content: BufferedReader) -> str:
    with os_errors("read", path):
        content.seek(0)
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_lines(file: BatchFile) -> Iterator[Line]:
    """Raises InputError for a Parquet file without the columns, and at the end for a file that is
    not what it was.
    """
    seen: set[bytes] = set()
    is_parquet = file.path.suffix.lower() == ".parquet"
    file.content.seek(0)
    for number, record in (_parquet_records if is_parquet else _json_records)(file):
        custom_id = record.get("custom_id") if isinstance(record, Mapping) else None
        if not isinstance(custom_id, str) or no_data_of_a_line(custom_id) is not None:
            custom_id = None
        try:
            line = _line(number, record, custom_id, seen)
        except LineError as error:
            line = Line(number, custom_id or None, "", {}, error.refusal)
        yield line
    if _sha256(file.path, file.content) != file.sha256:
        raise InputError(f"{file.path} changed while it was read: start again when it is written")


def _line(number: int, record: Any, custom_id: str | None, seen: set[bytes]) -> Line:
    if isinstance(record, LineError):
        raise record
    if not isinstance(record, Mapping):
        raise LineError("the line is not a JSON object", "invalid_line")
    for value in record.values():
        if isinstance(value, LineError):
            raise value
    if not custom_id:
        given = record.get("custom_id")
        what = "must be text that is not empty" if given is not None else "is missing"
        if isinstance(given, str) and given:
            what = str(no_data_of_a_line(given))
        raise LineError(f"custom_id {what}", "invalid_custom_id", "custom_id")
    digest = hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=16).digest()
    if digest in seen:
        raise LineError(
            f"custom_id {custom_id!r} is that of an earlier line",
            "duplicate_custom_id",
            "custom_id",
        )
    seen.add(digest)
    for key in ("method", "url"):
        if not isinstance(record.get(key), str):
            what = "must be text" if record.get(key) is not None else "is missing"
            raise LineError(f"{key} {what}", "invalid_line", key)
    if record["method"].upper() != "POST":
        raise LineError(f"method must be POST, got {record['method']}", "invalid_method", "method")
    body = record.get("body")
    if isinstance(body, str):
        body = _parsed(body, "the body")
    if not isinstance(body, Mapping):
        what = "must be a JSON object" if body is not None else "is missing"
        raise LineError(f"body {what}", "invalid_line", "body")
    return Line(number, custom_id, record["url"], body)


def _json_records(file: BatchFile) -> Iterator[tuple[int, Any]]:
    with os_errors("read", file.path):
        for number, content in enumerate(file.content, start=1):
            if not (content := content.strip()):
                continue
            try:
                yield number, _parsed(content.decode("utf-8-sig"), "the line")
            except UnicodeDecodeError as error:
                yield number, LineError(f"the line is not UTF-8: {error.reason}", "invalid_json")
            except LineError as error:
                yield number, error


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(f"{what} is not valid JSON: {error}", "invalid_json") from None


def _parquet_records(batch_file: BatchFile) -> Iterator[tuple[int, Any]]:
    path = batch_file.path
    try:
        with os_errors("read", path):
            file = pq.ParquetFile(batch_file.content)
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None
    if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
        raise InputError(
            f"{path} has no column {missing[0]}: a batch has the columns {', '.join(COLUMNS)}"
        )
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(COLUMNS)):
            for record in _records(batch):
                number += 1
                yield number, record
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read after {number} rows: {error}") from None


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows; a value that Python cannot hold is a LineError in its place."""
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except (ValueError, OverflowError, pa.ArrowException):  # not UTF-8, a date after 9999
        columns = [[_value(one, name) for one in batch.column(name)] for name in batch.schema.names]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, map(_as_json, values), strict=True))


def _value(scalar: pa.Scalar[Any], name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return LineError(f"{name} is not UTF-8: {error.reason}", "invalid_json", name)
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return LineError(f"{name} holds what cannot be read: {error}", "invalid_line", name)


def _as_json(value: Any) -> Any:
    """A struct has a field for each key that any row has; a decimal is a number."""
    if isinstance(value, dict):
        return {name: _as_json(v) for name, v in value.items() if v is not None}
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return [_as_json(v) for v in value] if isinstance(value, list) else value
