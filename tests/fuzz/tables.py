"""Input files: columns of any type under any name, in several shards, row groups and hive folders.

What pyarrow cannot write and read back is replaced by text: it could not be somebody's input.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import assume
from hypothesis import strategies as st

from tests.fuzz import arrow
from tests.fuzz.odds import rarely
from tests.fuzz.store import can_store

_NAMES = (
    "text",
    "text",
    "id",
    "n",
    "row",
    "shard",
    "sample",
    "completion",
    "day",
    " ",
    "text",
    "",
    "text",
    "a.b",
    "a b",
    "it's",
    'say "hi"',
    "line\nbreak",
    "größe",
    "列",
    "if",
    "loop",
    "self",
    "none",
    "range",
    "namespace",
    "items",
    "select",
    "1st",
    "__class__",
    "{{ x }}",
    "%s",
    "id ",
    "ID",
    "👍",
    "a\x00b",
)
_FILES = (
    "b.parquet",
    "c d.parquet",
    "ü.parquet",
    "x[1].parquet",
    "%41.parquet",
    'quote".parquet',
    "a#b?.parquet",
    "sub.parquet",
    "a.PARQUET.parquet",
)
_FOLDERS = (
    "",
    "",
    "",
    "sub/",
    "day=2026-11-21/",
    "day=__HIVE_DEFAULT_PARTITION__/",
    "day=a%2Fb/",
    "k=1/day=2/",
    "text=x/",
)
_ROLES = ("system", "user", "assistant", "tool", "developer", "", "bot", "User")

#: What a type that only its writer knows leaves in a file.
_UNKNOWN_EXTENSION = {"ARROW:extension:name": "tests.unknown", "ARROW:extension:metadata": "x"}

MESSAGES, TOKEN_IDS, BROKEN_TEXT = "messages", "token ids", "broken text"
NUMBERS, FORMS = "numbers of settings", "forms of settings"
_NUMBER_TYPES = (pa.int64(), pa.float64(), pa.uint8(), pa.float32(), pa.decimal128(9, 2))
_FORMS = (
    None,
    "x",
    "[a-z]+",
    '{"type": "object"}',
    '{"type": 1}',
    'root ::= "a" | "b"',
    "(",
    "{",
)

_any_text = st.text(max_size=6).filter(lambda name: _is_utf8(name))
names = st.one_of(st.sampled_from(_NAMES), st.sampled_from(_NAMES), _any_text, st.just("text"))


@dataclass(frozen=True, slots=True)
class Input:
    """Shards by their path below the input folder, each with the rows of a row group."""

    shards: dict[str, tuple[pa.Table, int]]

    @property
    def tables(self) -> list[pa.Table]:
        return [table for table, _ in self.shards.values()]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (table, group_rows) in self.shards.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=group_rows)


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    kind: pa.DataType | str


@st.composite
def inputs(draw: st.DrawFn) -> Input:
    """One to three shards. Mostly they have the same columns; their order and types may differ."""
    columns = draw(_columns())
    shards: dict[str, tuple[pa.Table, int]] = {}
    num_shards = draw(st.sampled_from((1, 1, 2, 3)))
    folder = draw(st.sampled_from(_FOLDERS))
    for number in range(num_shards):
        name = "a.parquet" if number == 0 else draw(st.sampled_from(_FILES))
        if number and draw(st.booleans()):
            folder = draw(st.sampled_from(_FOLDERS))
        of_shard = columns
        if number and columns and rarely(draw, 5):
            of_shard = draw(_changed(columns))
        table = draw(_tables(of_shard))
        group_rows = draw(st.sampled_from((1, 2, 3, 1000)))
        assume(can_store(table, group_rows))
        shards[folder + name] = (table, group_rows)
    return Input(shards)


@st.composite
def _columns(draw: st.DrawFn) -> list[Column]:
    found = []
    some = st.lists(names, min_size=draw(st.sampled_from((2, 1, 2, 1, 2, 0))), max_size=5)
    for name in draw(some):  # a name may come twice: files have that
        kind = draw(
            st.sampled_from(
                (
                    *("text", "text", "type", "type", "type", "flat", MESSAGES, TOKEN_IDS),
                    *(BROKEN_TEXT, NUMBERS, NUMBERS, FORMS),
                )
            )
        )
        if kind == "text":
            kind = draw(arrow.text_types)
        elif kind == "flat":
            kind = draw(arrow.types(0))
        elif kind == "type":
            kind = draw(arrow.types())
        found.append(Column(name, kind))
    if not rarely(draw, 25):
        found = list({column.name: column for column in found}.values())
    return found


@st.composite
def _changed(draw: st.DrawFn, columns: list[Column]) -> list[Column]:
    """As another writer would have it: another order, type, a column more or less."""
    changed = list(columns)
    index = draw(st.integers(0, len(columns) - 1))
    change = draw(st.sampled_from(("type", "flat", "drop", "add", "order")))
    if change == "order":
        changed.reverse()
    elif change == "drop":
        del changed[index]
    elif change == "add":
        changed.append(Column("more", pa.int64()))
    else:
        kind = draw(arrow.types(2 if change == "type" else 0))
        changed[index] = Column(columns[index].name, kind)
    return changed


@st.composite
def _tables(draw: st.DrawFn, columns: list[Column]) -> pa.Table:
    num_rows = draw(st.sampled_from((0, 1, 2, 3, 5, 8, 40)))
    arrays = [_stored(_array(draw, column.kind, num_rows)) for column in columns]
    labels = st.sampled_from((None, None, None, _UNKNOWN_EXTENSION))
    fields = [
        pa.field(column.name, array.type, metadata=draw(labels))
        for column, array in zip(columns, arrays, strict=True)
    ]
    schema = pa.schema(fields)
    if rarely(draw, 10):
        schema = schema.with_metadata({b"pandas": b"{}", b"\xff": b"\xff"})
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(draw: st.DrawFn, kind: pa.DataType | str, num_rows: int) -> pa.Array:
    """A few values, repeated: what is rare in a column is what a row trips over."""
    of_kind = {
        MESSAGES: _conversations(),
        TOKEN_IDS: st.lists(st.integers(-1, 5000) | st.none(), max_size=5) | st.none(),
        BROKEN_TEXT: st.binary(max_size=4),
        NUMBERS: st.sampled_from((None, 0, 1, 1, 2, 7, 0.5, 40, -1, 2048)),
        FORMS: st.sampled_from(_FORMS),
    }
    wanted = arrow.values(kind) if isinstance(kind, pa.DataType) else of_kind[kind]
    some = draw(st.lists(wanted, min_size=1, max_size=4))
    entries = [some[number % len(some)] for number in range(num_rows)]
    if kind == MESSAGES:
        return _messages_array(entries)
    if kind == TOKEN_IDS:
        integers = draw(st.sampled_from((pa.int64(), pa.int32(), pa.uint16())))
        return _made(entries, pa.list_(integers)) or pa.array(entries, pa.list_(pa.int64()))
    if kind == NUMBERS:
        numbers = draw(st.sampled_from(_NUMBER_TYPES))
        return _made(entries, numbers) or pa.array(entries, pa.float64())
    if kind == FORMS:
        return pa.array(entries, pa.string())
    if kind == BROKEN_TEXT:
        stored = pa.array(entries, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(stored), stored.buffers())
    return _made(entries, kind) or pa.array([str(entry) for entry in entries], pa.string())


def _made(entries: list[Any], data_type: pa.DataType) -> pa.Array | None:
    try:
        return arrow.array(entries, data_type)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError):
        return None


def _stored(array: pa.Array) -> pa.Array:
    if can_store(pa.table({"x": array}), 1):
        return array
    return pa.array([f"{number}" for number in range(len(array))], pa.string())


def _conversations() -> st.SearchStrategy[Any]:
    """Conversations as data sets have them, and as they should not."""
    parts = st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(("text", "text", "image_url", ""))},
            optional={"text": arrow.texts | st.none()},
        ),
        max_size=2,
    )
    arguments = st.sampled_from(('{"a": 1}', "{", "", {"a": None}, None, [1]))
    calls = st.lists(
        st.fixed_dictionaries(
            {"function": st.fixed_dictionaries({"name": arrow.texts, "arguments": arguments})}
        ),
        max_size=2,
    )
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(_ROLES), "content": arrow.texts | arrow.texts | st.none() | parts},
        optional={"name": st.none() | st.text(max_size=3), "tool_calls": st.none() | calls},
    )
    plain = st.fixed_dictionaries({"role": st.sampled_from(_ROLES), "content": arrow.texts})
    odd = st.sampled_from(
        (
            None,
            [],
            [None],
            ["x"],
            7,
            "text",
            {"role": "user", "content": "x"},
            {"messages": [{"role": "user", "content": "x"}]},
            [{"role": 1, "content": 2}],
            [{"from": "human", "value": "x"}],
        )
    )
    some = st.lists(message, min_size=1, max_size=3)
    return st.one_of(st.lists(plain, min_size=1, max_size=3), some, odd, some)


def _messages_array(entries: list[Any]) -> pa.Array:
    """As structs where all fit, else as JSON text."""
    if all(_is_conversation(entry) for entry in entries):
        try:
            return pa.array(entries)  # as Arrow finds the types, nested ones too
        except (pa.ArrowException, TypeError, UnicodeError):
            pass
    return pa.array([None if e is None else json.dumps(e) for e in entries], pa.string())


def _is_conversation(entry: Any) -> bool:
    return entry is None or (
        isinstance(entry, list) and all(isinstance(m, dict | None) for m in entry)
    )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
