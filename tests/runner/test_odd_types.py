"""Types of columns that Arrow or polars itself gets wrong: list views, offsets as time zones."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import ConfigError
from batchinfer.source import RowFilter, cast_table, plain_column
from tests.support.endings import changed
from tests.support.jobs import Place, job, run, write_job

_VIEW = pa.list_view(pa.int64())


@pytest.mark.parametrize(
    ("data_type", "values"),
    [
        (_VIEW, [[1, 2], None, [], [3]]),
        (pa.large_list_view(pa.string_view()), [["a"], None, ["b", None]]),
        (pa.struct([("xs", _VIEW), ("n", pa.int8())]), [{"xs": [1], "n": 1}, None]),
        (pa.list_(_VIEW), [[[1], None], None, [[2, 3]]]),
        (pa.list_(_VIEW, 2), [[[1], [2]], None, [None, [3]]]),
        (pa.list_(_VIEW, 0), [[], None, []]),
        (pa.map_(pa.string(), _VIEW), [[("a", [1, 2])], None, [("b", None), ("c", [])]]),
        (pa.list_view(pa.map_(pa.large_string(), _VIEW)), [[[("a", [1])], None], None]),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 1])
def test_list_views_at_any_depth_are_lists_of_the_same_values(
    data_type: pa.DataType, values: list[Any], start: int
) -> None:
    column = pa.chunked_array([pa.array(values, data_type).slice(start)])
    plain = plain_column(column)
    plain.validate(full=True)
    assert "view" not in str(plain.type)
    assert "large" not in str(plain.type)
    assert plain.to_pylist() == values[start:]


@pytest.mark.parametrize(
    ("data_type", "values", "wanted"),
    [
        (pa.list_(pa.null()), [[None] * 3, None, [None]], pa.list_(pa.field("x", pa.null()))),
        (pa.list_(pa.null()), [[None] * 3, None, []], pa.list_(pa.int64())),
        (
            pa.map_(pa.string(), pa.null()),
            [[("a", None), ("b", None)], None],
            pa.map_(pa.large_string(), pa.null()),
        ),
        (
            pa.list_(pa.struct([("a", pa.null())])),
            [[{"a": None}] * 3, None],
            pa.list_(pa.field("x", pa.struct([("a", pa.null())]))),
        ),
    ],
    ids=str,
)
def test_nulls_inside_of_lists_stay_as_many_as_they_are(
    data_type: pa.DataType, values: list[Any], wanted: pa.DataType
) -> None:
    table = pa.table({"x": pa.array(values, data_type)})
    found = cast_table(table, pa.schema([("x", wanted)]))
    found.validate(full=True)
    assert found.schema.field("x").type == wanted
    assert found.column("x").to_pylist() == values


@pytest.mark.parametrize(
    ("sql", "passes"),
    [
        ("length(text) - 5 > 0", [2]),
        ("-length(text) < -1", [1, 2]),
        ("qty - 5 > 0", [2]),
        ("-qty < 0", [1, 2]),
        ("big - 1 < 0", [0]),
        ("cents + cents > 3000000000", [0]),
        ("cents * 2 > 3000000000", [0]),
        ("big * 2 > 9223372036854775807", [2]),
        ("EXTRACT(month FROM day) * 100 + EXTRACT(day FROM day) = 1231", [0]),
        ("month(day) * month(day) > 127", [0]),
        ("list[1] - 2 < 0", [0]),
        ('"length"(text) - 5 > 0', [2]),
        ("CAST(digits AS INTEGER) * 2 > 3000000000", [0]),
        ("digits::int4 * 2 > 3000000000 OR TRY_CAST(digits AS INT(4)) * 2 > 3000000000", [0]),
        ("CAST(qty AS UINTEGER) - 5 < 0 OR qty::int unsigned - 5 < 0", [0]),
        ("CAST(qty AS VARCHAR) = '5' AND CAST(qty AS DOUBLE) > 4.5", [1]),
        ("day > at", [0, 1]),
        ("at < DATE '9999-12-31'", [0, 1, 2]),
        ("EXTRACT(epoch FROM at) > 0.5", [0, 1, 2]),
        ("length(text) IN (1, 3) AND text <> ')' AND text <> 'length('", [0, 1]),
    ],
)
def test_a_filter_computes_with_whole_numbers_as_on_paper(sql: str, passes: list[int]) -> None:
    second = pa.array([1_000_000_000] * 3, pa.timestamp("ns"))
    table = pa.table(
        {
            "text": ["a", "abc", "abcdefgh"],
            "digits": ["2000000000", "1", "2"],
            "qty": pa.array([0, 5, 10], pa.uint32()),
            "big": pa.array([0, 1, 2**63], pa.uint64()),
            "cents": pa.array([2_000_000_000, 1, 2], pa.int32()),
            "day": [dt.date(9999, 12, 31), dt.date(2026, 1, 1), dt.date(1969, 1, 1)],
            "list": pa.array([[1], [2], [3]], pa.list_(pa.uint8())),
            "at": second,
        }
    )
    row_filter = RowFilter(sql)
    row_filter.check(table.schema)
    assert np.flatnonzero(row_filter.mask(table)).tolist() == passes


@pytest.mark.parametrize("sql", ["b IS NOT TRUE", "n > 1 OR (b is  not\nfalse)"])
def test_a_filter_that_polars_reads_otherwise_than_sql_is_refused(sql: str) -> None:
    with pytest.raises(ConfigError, match="of a null, `IS NOT TRUE` is null in polars"):
        RowFilter(sql)
    RowFilter("b = 'is not true' OR b IS NOT NULL")


def test_threads_that_polars_cannot_have_are_the_variables_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POLARS_MAX_THREADS", "0")
    with pytest.raises(ConfigError, match="POLARS_MAX_THREADS='0' must be a whole number from 1"):
        RowFilter("n > 1")


def test_a_filter_sees_nanoseconds_that_there_are() -> None:
    table = pa.table(
        {"a": pa.array([1, 2], pa.timestamp("ns")), "b": pa.array([1, 1], "timestamp[ns]")}
    )
    assert RowFilter("a > b").mask(table).tolist() == [False, True]


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_timestamps_of_96_bits_are_those_that_were_written(
    folder: Place, tmp_path: Path, zone: str | None
) -> None:
    """Spark, Hive and Impala write them, and 9999-12-31 for what has no end."""
    years = [2026, 9999, 3000, 1600]
    dates = pa.array([dt.date(year, 12, 31) for year in years])
    times = dates.cast(pa.timestamp("us")).cast(pa.timestamp("us", zone))
    source = pa.table({"text": ["a"] * 4, "until": times})
    (Path(folder.root) / "in").mkdir(parents=True)
    pq.write_table(source, folder.url("in", "a.parquet"), use_deprecated_int96_timestamps=True)
    settings = changed(
        job(folder), input={"keep_columns": ["until"], "filter": "EXTRACT(year FROM until) <> 3000"}
    )
    del settings["input"]["id_column"]
    settings["prompt"] = {"template": "{{ until }}"}
    ended = run(write_job(tmp_path, settings))
    assert ended.code == 0, ended.stderr
    found = pq.read_table(folder.url("out", "a.parquet")).column("until")
    assert [time.year for time in found.to_pylist()] == [2026, 9999, 1600]


def test_a_filter_compares_instants_whatever_the_offset_of_their_zone() -> None:
    zone = pa.timestamp("s", "+05:30")
    times = pa.array([946_684_799, 946_684_801, None], zone)
    deep = pa.array([{"at": [1]}, None, {"at": None}], pa.struct([("at", pa.list_(zone))]))
    table = pa.table({"at": times, "deep": deep})
    for sql, passes in (
        ("at >= DATE '2000-01-01'", [False, True, False]),
        ("deep IS NULL", [False, True, False]),
    ):
        row_filter = RowFilter(sql)
        row_filter.check(table.schema)
        assert row_filter.mask(table).tolist() == passes


def test_a_filter_over_wide_decimals_is_refused_without_a_panic(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A filter over decimals that polars has not is refused without its panic."""
    schema = pa.schema([("price", pa.decimal256(50, 2))])
    with pytest.raises(ConfigError, match=r"'price': decimal256.* has no equivalent in polars"):
        RowFilter("price > 1").check(schema)
    assert capfd.readouterr().err == ""


def test_a_filter_reads_lists_of_structs_with_nulls_alone() -> None:
    """Arrow's own cast shortens them, and says that the column is invalid."""
    kind = pa.list_(pa.struct([("role", pa.string()), ("tools", pa.null())]))
    values = [[{"role": "user", "tools": None}] * 4, None, [{"role": "system", "tools": None}]]
    table = pa.table({"text": ["a", "b", "c"], "messages": pa.array(values, kind)})
    row_filter = RowFilter("messages IS NOT NULL AND text <> 'c'")
    row_filter.check(table.schema)
    assert row_filter.mask(table).tolist() == [True, False, False]
