"""The id and kept columns have one type in all files of an output, and lose nothing by it."""

from __future__ import annotations

import datetime as dt
import json
import logging
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import Job
from batchinfer.runner.carried import Carrier, carried_columns, carried_schema, to_text
from batchinfer.source import Block, list_shards, output_field, read_footer, with_valid_text
from batchinfer.source.types import common_type, output_type
from batchinfer.storage import open_store
from tests.support.endings import changed, must_be_untouched, must_fail, read_bytes, write_bytes
from tests.support.jobs import Place, job, run, write_job

UTC, BERLIN = "UTC", "Europe/Berlin"


def struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (pa.null(), pa.string(), pa.string()),
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.uint32(), pa.uint32()),
        (pa.uint8(), pa.int8(), pa.int16()),
        (pa.uint32(), pa.int8(), pa.int64()),
        (pa.uint64(), pa.int64(), None),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.int16(), pa.float16(), pa.float32()),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.uint64(), pa.float32(), pa.float64()),
        (pa.bool_(), pa.int8(), None),
        (pa.string(), pa.int64(), None),
        (pa.string(), pa.binary(), None),
        (pa.binary(3), pa.binary(4), pa.binary()),
        (pa.decimal128(5, 2), pa.decimal128(10, 4), pa.decimal128(10, 4)),
        (pa.decimal128(10, 0), pa.decimal128(10, 9), pa.decimal128(19, 9)),
        (pa.decimal128(38, 0), pa.decimal128(38, 38), None),
        (pa.decimal32(5, 2), pa.decimal64(12, 2), pa.decimal128(12, 2)),
        (pa.int16(), pa.decimal128(5, 2), pa.decimal128(7, 2)),
        (pa.float32(), pa.decimal128(5, 2), None),
        (pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("s", UTC), pa.timestamp("ns", BERLIN), pa.timestamp("us", UTC)),
        (pa.timestamp("ns", UTC), pa.timestamp("ns", BERLIN), pa.timestamp("ns", UTC)),
        (pa.duration("ns"), pa.duration("ms"), pa.duration("us")),
        (pa.timestamp("s", BERLIN), pa.timestamp("ms", BERLIN), pa.timestamp("ms", BERLIN)),
        (pa.timestamp("s"), pa.timestamp("s", UTC), None),
        (pa.date32(), pa.date64(), pa.date32()),
        (pa.date32(), pa.timestamp("us"), None),
        (pa.time32("s"), pa.time64("us"), pa.time64("us")),
        (pa.duration("s"), pa.duration("ms"), pa.duration("ms")),
        (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
        (pa.list_(pa.int8(), 2), pa.list_(pa.int16(), 2), pa.list_(pa.int16(), 2)),
        (pa.list_(pa.int8(), 2), pa.list_(pa.int8()), pa.list_(pa.int8())),
        (pa.list_(pa.string()), pa.list_(pa.int8()), None),
        (
            struct(a=pa.int8(), b=pa.string()),
            struct(b=pa.string(), c=pa.null(), a=pa.int16()),
            struct(a=pa.int16(), b=pa.string(), c=pa.null()),
        ),
        (struct(a=pa.int8()), struct(a=pa.string()), None),
        (
            pa.map_(pa.string(), pa.int8()),
            pa.map_(pa.string(), pa.int32()),
            pa.map_(pa.string(), pa.int32()),
        ),
        (pa.uuid(), pa.binary(16), pa.binary(16)),
        (pa.uuid(), pa.null(), pa.uuid()),
        (pa.json_(), pa.string(), pa.string()),
        (struct(a=pa.int8()), pa.list_(pa.int8()), None),
    ],
)
def test_two_types_meet_where_no_value_is_lost(
    one: pa.DataType, other: pa.DataType, common: pa.DataType | None
) -> None:
    for left, right in ((one, other), (other, one)):
        found = common_type(left, right)
        if common is None or not pa.types.is_struct(common):
            assert found == common
        else:
            assert found is not None
            assert {field.name: field.type for field in found} == dict(
                (field.name, field.type) for field in common
            )
    for kind in (one, other) if common is not None else ():
        assert pa.nulls(3, kind).cast(common).null_count == 3, "no such values can be made"


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.list_view(pa.binary_view()), pa.list_(pa.binary())),
        (pa.large_list(pa.field("element", pa.int8(), nullable=False)), pa.list_(pa.int8())),
        (struct(u=pa.uuid(), l=pa.list_(pa.uuid(), 2)),) * 2,
        (pa.json_(pa.large_string()), pa.json_(pa.string())),
        (pa.opaque(pa.large_string(), "x", "y"), pa.string()),
        (pa.map_(pa.large_string(), pa.uuid()), pa.map_(pa.string(), pa.uuid())),
    ],
)
def test_an_output_keeps_what_a_type_means_and_not_how_it_was_stored(
    stored: pa.DataType, kept: pa.DataType
) -> None:
    assert output_type(stored).equals(kept, check_metadata=True)


NUMBERS = [pa.int8(), pa.uint8(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64(), pa.float16()]
NUMBERS += [pa.float32(), pa.float64(), pa.decimal128(3, 1), pa.decimal128(20, 5), pa.bool_()]
TIMES = [pa.date32(), pa.time32("s"), pa.time64("us"), pa.timestamp("s"), pa.timestamp("us", UTC)]
TIMES += [pa.timestamp("ms", BERLIN), pa.duration("us"), pa.duration("s")]
OTHERS = [pa.null(), pa.string(), pa.binary(), pa.binary(2), pa.binary(16), pa.uuid(), pa.json_()]
SCALARS = st.sampled_from([*NUMBERS, *TIMES, *OTHERS])
TYPES = st.recursive(
    SCALARS,
    lambda inner: (
        inner.map(pa.list_)
        | inner.map(lambda kind: pa.list_(kind, 2))
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(lambda f: struct(**f))
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(one=TYPES, other=TYPES)
def test_the_common_type_does_not_depend_on_the_order_and_holds_both(
    one: pa.DataType, other: pa.DataType
) -> None:
    common = common_type(one, other)
    assert (common is None) == (common_type(other, one) is None)
    if common is not None:
        assert common_type(common, one) == common == common_type(common, other)
        for kind in (one, other):
            pa.nulls(1, kind).cast(common)


# Text that is none


def of_bytes(*values: bytes | None) -> pa.Array:
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers(), array.null_count)


def test_text_that_is_not_utf8_is_repaired_wherever_it_is() -> None:
    text = of_bytes(b"fine", None, b"caf\xe9", b"\xff\xfe", "ß".encode())
    mended = ["fine", None, "caf\ufffd", "\ufffd\ufffd", "ß"]
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 5], pa.int32()), text)
    for array, expected in (
        (text, mended),
        (text.slice(2, 2), mended[2:4]),
        (lists, [mended[:2], [], mended[2:]]),
        (lists.slice(1), [[], mended[2:]]),
        (pa.StructArray.from_arrays([text], ["a"]).slice(1), [{"a": v} for v in mended[1:]]),
        (pa.MapArray.from_arrays([0, 1], of_bytes(b"k"), of_bytes(b"\xe9")), [[("k", "\ufffd")]]),
        (pa.FixedSizeListArray.from_arrays(of_bytes(b"\xe9", b"b"), 2), [["\ufffd", "b"]]),
        (pa.ExtensionArray.from_storage(pa.json_(), of_bytes(b"\xe9")), ["\ufffd"]),
    ):
        found, is_mended = with_valid_text(pa.chunked_array([array]))
        found.validate(full=True)
        assert found.type == array.type and found.to_pylist() == expected
        assert is_mended
    good = pa.chunked_array([pa.array(["a", "ß"])])
    assert with_valid_text(good) == (good, False)


def carrier(schema: pa.Schema) -> Carrier:
    settings = job(Place("/nowhere"), input={"path": "x", "keep_columns": schema.names[1:]})
    return Carrier(Job.model_validate(settings), schema)


def test_text_that_is_not_utf8_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    (shard,) = list_shards([str(tmp_path)], open_store)
    columns = carrier(pa.schema({"id": pa.string(), "note": pa.string()}))
    table = pa.table({"id": ["x", "y"], "note": of_bytes(b"\xe9", b"ok")})
    for first in (0, 2):
        block = Block(np.arange(first, first + 2), table)
        assert columns.table(shard, block).column("note").to_pylist() == ["\ufffd", "ok"]
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "'note' has text that is not UTF-8" in record.getMessage()
    assert f"{tmp_path}/a.parquet, rows 0 to 1" in record.getMessage()


# Whole runs


def write(place: Place, name: str, **columns: Any) -> None:
    table = pa.table({"text": ["a", "b"][: len(next(iter(columns.values())))], **columns})
    path = Path(place.url(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def of_output(place: Place, name: str) -> list[pa.DataType]:
    schema = pq.read_schema(place.url("out", name))
    return [schema.field(column).type for column in ("id", "note")]


def keeping(place: Place) -> dict[str, Any]:
    return changed(job(place), input={"keep_columns": ["note"]})


def test_all_files_of_an_output_have_one_schema_and_are_read_together(
    folder: Place, tmp_path: Path
) -> None:
    write(folder, "in/a.parquet", id=pa.array([1, 2], pa.int32()), note=["x", "y"])
    write(folder, "in/b.parquet", id=pa.array([3, 4], pa.int64()), note=pa.nulls(2))
    write(folder, "in/c.parquet", id=pa.nulls(0), note=pa.nulls(0))
    write(
        folder, "in/d.parquet", id=pa.array([5], pa.uint16()), note=pa.array(["z"], "string_view")
    )
    path = write_job(tmp_path, changed(keeping(folder), input={"filter": "id <> 5"}))
    ended = run(path, command=("validate",))
    assert ended.code == 0, ended.stderr
    ended = run(path)
    assert ended.code == 0, ended.stderr
    for name in ("a", "b", "c", "d"):
        assert of_output(folder, f"{name}.parquet") == [pa.int64(), pa.string()]
    found = pl.read_parquet(folder.url("out", "*.parquet"))
    assert found["id"].to_list() == [1, 2, 3, 4]
    assert found["note"].to_list() == ["x", "y", None, None]


def test_different_zones_are_reported_once_and_the_instants_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zones = {"a": BERLIN, "b": BERLIN, "c": UTC}
    for name, zone in zones.items():
        when = pa.array([0], pa.timestamp("ms", zone))
        pq.write_table(pa.table({"n": [1], "when": when}), tmp_path / f"{name}.parquet")
    settings = job(
        Place("/nowhere"), input={"path": "x", "id_column": "n", "keep_columns": ["when"]}
    )
    shards = [
        (shard, carried_columns(Job.model_validate(settings), read_footer(shard)))
        for shard in list_shards([str(tmp_path)], open_store)
    ]
    carried = carried_schema(Job.model_validate(settings), shards, None)
    assert carried.field("when").type == pa.timestamp("ms", UTC)
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"when: the input's time zones differ (Europe/Berlin in {tmp_path}/a.parquet" in said
    assert said.endswith("the same instants in UTC")
    caplog.clear()
    assert carried_schema(Job.model_validate(settings), shards[:2], None) and not caplog.records


def test_integers_become_double_where_another_file_has_nulls_among_them(
    folder: Place, tmp_path: Path
) -> None:
    """As pandas writes a column that has nulls; never an integer that double has not exactly."""
    write(folder, "in/a.parquet", id=[1, 2**53], note=[[1], [2]])
    write(folder, "in/b.parquet", id=[1.0, None], note=[[0.5], None])
    path = write_job(tmp_path, keeping(folder))
    assert run(path).code == 0
    for name in ("a.parquet", "b.parquet"):
        assert of_output(folder, name) == [pa.float64(), pa.list_(pa.float64())]
    assert pl.read_parquet(folder.url("out", "a.parquet"))["id"].to_list() == [1.0, 2.0**53]
    write(folder, "in/c.parquet", id=[1, 2**53 + 1], note=[[1], [2]])
    ended = run(path)
    must_fail(ended, 2, folder.url("in/c.parquet"), "column 'id' cannot be double", "one type")


def test_types_that_do_not_meet_are_refused_with_both_shards(folder: Place, tmp_path: Path) -> None:
    write(folder, "in/a.parquet", id=["1", "2"], note=pa.nulls(2))
    write(folder, "in/b.parquet", id=[3, 4], note=[[1], [2]])
    write(folder, "in/c.parquet", id=["5", "6"], note=["x", "y"])
    path = write_job(tmp_path, keeping(folder))
    words = (
        f"input.id_column: 'id' is int64 in {folder.url('in/b.parquet')} and string in "
        f"{folder.url('in/a.parquet')}",
        f"input.keep_columns: 'note' is string in {folder.url('in/c.parquet')} and "
        f"list<item: int64> in {folder.url('in/b.parquet')}",
    )
    validated = run(path, command=("validate",))
    assert validated.code == 2 and all(word in validated.stderr for word in words)
    must_fail(run(path), 2, *words)
    must_be_untouched(folder)


def test_a_shard_that_comes_later_must_fit_what_the_output_was_begun_with(
    folder: Place, tmp_path: Path
) -> None:
    write(folder, "in/a.parquet", id=pa.array([1, 2], pa.int32()), note=["x", "y"])
    path = write_job(tmp_path, keeping(folder))
    assert run(path).code == 0
    write(folder, "in/b.parquet", id=pa.array([3, 4], pa.int64()), note=["x", "y"])
    words = (
        f"'id' is int64 in {folder.url('in/b.parquet')}, and int32 in the output",
        "output.path",
    )
    validated = run(path, command=("validate",))
    assert validated.code == 2 and all(word in validated.stderr for word in words)
    must_fail(run(path), 2, *words)
    write(folder, "in/b.parquet", id=pa.array([3, 4], pa.int8()), note=pa.nulls(2))
    ended = run(path)
    assert ended.code == 0 and ended.result["rows_computed"] == 2, ended.stderr
    assert of_output(folder, "b.parquet") == [pa.int32(), pa.string()]


FOREVER = dt.datetime(9999, 12, 31)  # noqa: DTZ001 (as files have it)


def test_a_date_far_off_and_nanoseconds_in_another_file_end_no_run(
    folder: Place, tmp_path: Path
) -> None:
    """No type has both: digits below a microsecond are left out, with a warning."""
    write(folder, "in/a.parquet", id=[1, 2], note=pa.array([1_000, 1_001], pa.timestamp("ns")))
    write(folder, "in/b.parquet", id=[3], note=pa.array([FOREVER], pa.timestamp("us")))
    ended = run(write_job(tmp_path, keeping(folder)))
    assert ended.code == 0, ended.stderr
    (said,) = ended.result["warnings"]
    assert "'note' has nanoseconds, first in " in said and "/in/a.parquet" in said
    found = pl.read_parquet(folder.url("out", "*.parquet"))
    one = dt.datetime(1970, 1, 1, microsecond=1)  # noqa: DTZ001
    assert found["note"].to_list() == [one, one, FOREVER]


def test_an_output_begun_with_nanoseconds_is_resumed(folder: Place, tmp_path: Path) -> None:
    """Versions before 0.2 took the finest unit, and read INT96 in it."""
    write(folder, "in/a.parquet", id=[1], note=pa.array([FOREVER.replace(2200)], "timestamp[us]"))
    path = write_job(tmp_path, keeping(folder))
    assert run(path).code == 0
    record = json.loads(read_bytes(folder, "out/_batchinfer/job.json"))
    begun = pa.schema([("id", pa.int64()), ("note", pa.timestamp("ns"))])
    record["carried_schema"] = to_text(begun)
    write_bytes(folder, "out/_batchinfer/job.json", json.dumps(record).encode())
    write(folder, "in/b.parquet", id=[2], note=pa.array([FOREVER.replace(2201)], "timestamp[us]"))
    ended = run(path)
    assert ended.code == 0, ended.stderr
    assert of_output(folder, "b.parquet") == [pa.int64(), pa.timestamp("ns")]


def test_a_type_unknown_here_stays_in_files_that_come_later(folder: Place, tmp_path: Path) -> None:
    """It stands in the field's metadata, which a later file without it does not take away."""
    unknown = {"ARROW:extension:name": "tests.unknown", "ARROW:extension:metadata": "x"}
    path = write_job(tmp_path, keeping(folder))
    for name, metadata in (("a", unknown), ("b", None)):
        note = pa.field("note", pa.string(), metadata=metadata)
        schema = pa.schema([("id", pa.int32()), ("text", pa.string()), note])
        file = Path(folder.url("in", f"{name}.parquet"))
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table([[1], ["one"], ["x"]], schema=schema), file)
        ended = run(path)
        assert ended.code == 0, ended.stderr
    schemas = [pq.read_schema(folder.url("out", f"{name}.parquet")) for name in "ab"]
    assert schemas[0].field("note").metadata == schemas[1].field("note").metadata


def test_an_output_of_a_version_without_one_schema_continues_as_it_began(
    folder: Place, tmp_path: Path
) -> None:
    write(folder, "in/a.parquet", id=["1", "2"], note=["x", "y"])
    path = write_job(tmp_path, keeping(folder))
    assert run(path, "--limit", "1").code == 0
    record = json.loads(read_bytes(folder, "out/_batchinfer/job.json"))
    del record["carried_schema"]
    write_bytes(folder, "out/_batchinfer/job.json", json.dumps(record).encode())
    write(folder, "in/b.parquet", id=[3, 4], note=[b"x", b"y"])
    assert run(path, command=("validate",)).code == 0
    ended = run(path)
    assert ended.code == 0 and ended.result["rows_computed"] == 3, ended.stderr
    assert of_output(folder, "b.parquet") == [pa.int64(), pa.binary()]


def every_kind() -> pa.Table:
    """Two rows of each type that an output can keep."""
    one, two = uuid.UUID(int=1), uuid.UUID(int=2**127)
    unknown = pa.field(
        "unknown",
        pa.binary(3),
        metadata={"ARROW:extension:name": "of.somebody", "ARROW:extension:metadata": "7"},
    )
    when = dt.datetime(2026, 11, 28, 12, tzinfo=dt.UTC)
    columns = {
        "uuid": pa.array([one.bytes, None], pa.uuid()),
        "uuids": pa.array([[one.bytes], []], pa.list_(pa.binary(16))).cast(pa.list_(pa.uuid())),
        "json": pa.array(['{"a": 1}', None], pa.json_()),
        "decimal": pa.array([Decimal("1.50"), None]),
        "wide": pa.array([Decimal("1.5"), None]).cast(pa.decimal256(50, 3)),
        "small": pa.array([Decimal("1.5"), None]).cast(pa.decimal32(5, 1)),
        "binary": pa.array([b"\xff\x00", None]),
        "fixed": pa.array([b"ab", None], pa.binary(2)),
        "half": pa.array([0.5, None], pa.float16()),
        "time": pa.array([when.time(), None]),
        "second": pa.array([1, None], pa.time32("s")),
        "berlin": pa.array([when, None], pa.timestamp("ms", BERLIN)),
        "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
        "duration": pa.array([dt.timedelta(days=1), None]),
        "word": pa.array(["a", None]).dictionary_encode(),
        "view": pa.array(["a", None], pa.string_view()),
        "tensor": pa.array([[1, 2], None], pa.list_(pa.int8(), 2)),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int8())),
        "nested": pa.array([{"a": [{"b": two.bytes}]}, None]),
        "nothing": pa.nulls(2),
        "big": pa.array([2**64 - 1, None], pa.uint64()),
    }
    table = pa.table({"text": ["a", "b"], **columns})
    table = table.append_column(unknown, pa.array([b"abc", None], pa.binary(3)))
    return table


def test_every_type_keeps_its_meaning_and_its_values(folder: Place, tmp_path: Path) -> None:
    """Through parts, folds and a finished file."""
    table = every_kind()
    (Path(folder.root) / "in").mkdir(parents=True)
    pq.write_table(table, folder.url("in", "a.parquet"))
    kept = table.column_names[1:]
    for id_column in ("uuid", "nanoseconds"):
        settings = job(folder, id_column, input={"id_column": id_column, "keep_columns": kept})
        path = write_job(
            tmp_path,
            changed(settings, input=settings["input"] | {"path": folder.url("in", "*.parquet")}),
        )
        assert run(path, "--limit", "1").code == 0
        ended = run(path)
        assert ended.code == 0, ended.stderr
        found = pq.read_table(folder.url(id_column, "a.parquet"))
        expected = pq.read_table(folder.url("in", "a.parquet"))
        for name in kept:
            field, as_read = found.schema.field(name), expected.schema.field(name)
            assert field.type == output_field(name, as_read).type, name
            values = expected.column(name)
            assert found.column(name).cast(as_read.type).equals(values) or (
                pa.types.is_dictionary(as_read.type)
                and found.column(name).to_pylist() == values.to_pylist()
            ), name
        assert found.schema.field("unknown").metadata[b"ARROW:extension:name"] == b"of.somebody"
        assert found.column("id").equals(found.column(id_column))
        stored = pq.ParquetFile(folder.url(id_column, "a.parquet")).schema
        types = {
            stored.column(i).name: str(stored.column(i).logical_type) for i in range(len(stored))
        }
        assert types["uuid"] == "UUID" and types["json"] == "JSON"


def test_a_filter_that_fits_only_some_files_names_the_first_that_it_does_not(
    folder: Place, tmp_path: Path
) -> None:
    write(folder, "in/a.parquet", id=["1", "2"], n=pa.array([1, 2], pa.int8()))
    write(folder, "in/b.parquet", id=["3", "4"], n=["1", "2"])
    write(folder, "in/c.parquet", id=["5", "6"], n=["1", "2"])
    path = write_job(tmp_path, changed(job(folder), input={"filter": "n > 1"}))
    words = f"shard {folder.url('in/b.parquet')} and 1 more: input.filter 'n > 1' does not fit"
    must_fail(run(path), 2, words)
    everywhere = run(path, "--set", "input.filter=n > [", command=("validate",))
    assert everywhere.code == 2 and "shard" not in everywhere.stderr


def test_ids_are_counted_over_files_that_wrote_them_in_other_types(
    folder: Place, tmp_path: Path
) -> None:
    far = pa.array([10**14, 10**14 + 1], pa.timestamp("s"))
    write(folder, "in/a.parquet", id=pa.array([1, 2], pa.int32()), far=far)
    write(folder, "in/b.parquet", id=pa.array([2, 3], pa.int64()), far=far)
    path = write_job(tmp_path, job(folder))
    counted = run(path, "--ids", command=("validate",))
    assert counted.code == 0, counted.stderr
    assert "0 null, 1 values that occur more than once" in counted.stdout
    assert "a.parquet:1 2" in counted.stdout and "b.parquet:0 2" in counted.stdout
    beyond_python = ("--ids", "--set", "input.id_column=far")
    counted = run(path, *beyond_python, command=("validate",))
    assert counted.code == 0, counted.stderr
    assert "2 values that occur more than once" in counted.stdout
