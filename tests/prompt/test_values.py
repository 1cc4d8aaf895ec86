"""Values of any Arrow type in templates: text, numbers, lists and dicts, or the row's error."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import PromptSettings
from batchinfer.errors import InputError, RowError
from batchinfer.prompt import check_references
from batchinfer.prompt.numbers import ExactNumber
from batchinfer.prompt.render import text_template
from batchinfer.prompt.stand_ins import Unreadable, stand_in
from batchinfer.prompt.values import column_values, template_values, why_unreadable


def rendered(source: str, **columns: pa.Array) -> list[str]:
    """The text of each row, or the kind and the message of its error."""
    template = text_template(source, "prompt.template")
    values = {
        name: template_values(pa.chunked_array([array]), name, stand_in)
        for name, array in columns.items()
    }
    found = []
    for row in zip(*values.values(), strict=True):
        try:
            found.append(template.render(dict(zip(values, row, strict=True))))
        except RowError as error:
            found.append(f"{error.kind}: {error.message}")
    return found


def x(source: str, array: pa.Array) -> list[str]:
    return rendered(source, x=array)


def refusal(source: str, data_type: pa.DataType) -> str:
    """What is said before anything runs about a template of a column `x` of this type."""
    prompt = PromptSettings.model_validate({"template": source})
    try:
        check_references(prompt, pa.schema([("x", data_type)]))
    except InputError as error:
        return str(error)
    return ""


# Nulls

NULL = "missing_value: column 'x' is null"


@pytest.mark.parametrize(
    ("source", "of_null"),
    [
        ("{% if x %}Context: {{ x }}. {% endif %}t", "t"),
        ("{{ x or 'none' }}", "none"),
        ("{{ x | default('none', true) }}", "none"),
        ("{{ x | default('none') }}", "none"),
        ("{{ 'yes' if x is none else 'no' }}", "yes"),
        ("{{ 'yes' if x == none else 'no' }}", "yes"),
        ("{{ 'yes' if x is defined else 'no' }}", "no"),
        ("{{ 'yes' if x.a.b[0] else 'no' }}", "no"),
        ("{{ [x, 'b'] | select | join }}", "b"),
        ("{{ [x, 'b'] | reject('none') | join }}", "b"),
        ("{% for y in x or [] %}{{ y }}{% endfor %}.", "."),
        ("{{ x | tojson }}", "null"),
        ("{{ {'a': [x]} | tojson }}", '{"a": [null]}'),
    ],
)
def test_a_null_may_be_asked_about(source: str, of_null: str) -> None:
    assert x(source, pa.array(["a", None]))[1] == of_null


@pytest.mark.parametrize(
    "source",
    [
        "{{ x }}",
        "{{ x ~ 'a' }}",
        "{{ x + 'a' }}",
        "{{ x > 'a' }}",
        "{{ -x }}",
        "{{ x | abs }}",
        "{{ x | upper }}",
        "{{ x | trim }}",
        "{{ x | string }}",
        "{{ x | int }}",
        "{{ x | length }}",
        "{{ '%s' | format(x) }}",
        "{{ '%s' % x }}",
        "{{ '{}'.format(x) }}",
        "{{ x.strip() }}",
        "{{ [x] }}",
        "{{ [x] | join }}",
        "{{ {'a': x} }}",
        "{{ {x: 1} }}",
        "{{ [x] | string }}",
        "{% for y in x %}{% endfor %}",
        "{{ x.a }}",
        "{{ [x, 'a'] | sort }}",
        "{{ x | pprint }}",
        "{{ [x] | map('upper') | join }}",
        "{{ 'a' | replace('a', x) }}",
        "{{ x is iterable }}",
    ],
)
def test_a_null_that_is_printed_or_computed_with_is_a_missing_value(source: str) -> None:
    assert x(source, pa.nulls(1, pa.string())) == [NULL]


def test_a_null_inside_a_value_is_missing_where_it_is_used() -> None:
    rows = pa.array([{"a": None, "tags": ["t", None]}, {"a": "b", "tags": []}])
    assert x("{{ x.a or 'no a' }}", rows) == ["no a", "b"]
    assert x("{{ x.a }}", rows) == ["missing_value: a of column 'x' is null", "b"]
    assert x("{{ x }}", rows)[1] == "{'a': 'b', 'tags': []}"
    assert x("{{ x | tojson }}", rows)[0] == '{"a": null, "tags": ["t", null]}'
    in_tags = "missing_value: tags[] of column 'x' is null"
    assert x("{{ x.tags | join }}", rows) == [in_tags, ""]
    assert x("{% for t in x.tags if t %}{{ t }}{% endfor %}", rows) == ["t", ""]
    assert x("{{ x.tags[1] }}", rows)[0] == in_tags
    entries = pa.array([[("k", None)]], pa.map_(pa.string(), pa.string()))
    of_entry = "missing_value: [].value of column 'x' is null"
    assert x("{% for key, value in x %}{{ value }}{% endfor %}", entries) == [of_entry]


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16()])
def test_nan_is_missing_and_infinity_a_number(kind: pa.DataType) -> None:
    numbers = pa.array([float("nan"), float("inf"), 1.5], kind)
    assert x("{{ x }}", numbers) == ["missing_value: column 'x' is NaN", "inf", "1.5"]
    assert x("{{ x or 'none' }}", numbers) == ["none", "inf", "1.5"]
    assert x("{{ [x] | tojson }}", numbers)[::2] == ["[null]", "[1.5]"]
    assert "template_error" in x("{{ x | tojson }}", numbers)[1]


# Numbers


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ x }}", "1.50"),
        ("{{ x * 2 }}", "3.00"),
        ("{{ x + 1 }} {{ 1 - x }} {{ -x }}", "2.50 -0.50 -1.50"),
        ("{{ x * 1.1 }} {{ 1.1 * x }}", "1.650 1.650"),
        ("{{ x / 4 }} {{ x // 1 }} {{ x % 1 }} {{ x ** 2 }}", "0.375 1 0.50 2.2500"),
        ("{{ x == 1.5 }} {{ 1.5 == x }} {{ x > 1 }}", "True True True"),
        ("{{ x < 1.4 }} {{ 2.5 > x }} {{ x != 1.5 }}", "False True False"),
        ("{{ x in [1.5] }}", "True"),
        ("{{ '%.1f' | format(x) }} {{ '{:.3f}'.format(x) }}", "1.5 1.500"),
        ("{{ x | round(1) }} {{ x | round(0, 'floor') }}", "1.5 1.0"),
        ("{{ x | int }} {{ x | float }}", "1 1.5"),
        ("{{ [x, x * 2] }} {{ {'a': x} }} {{ [x, x] | sum }}", "[1.50, 3.00] {'a': 1.50} 3.00"),
        ("{{ x | tojson }} {{ (x * 2) | tojson }}", "1.5 3"),
        ("{{ x is number }}", "True"),
    ],
)
def test_decimals_are_exact_numbers(source: str, text: str) -> None:
    for kind in (pa.decimal128(10, 2), pa.decimal256(50, 2), pa.decimal32(5, 2)):
        assert x(source, pa.array([Decimal("1.50")], kind)) == [text]


def test_decimals_keep_every_digit_and_have_no_exponent() -> None:
    widest = pa.array([Decimal("9" * 76)], pa.decimal256(76, 0))
    assert x("{{ x * x }}", widest) == [str((10**76 - 1) ** 2)]
    small = pa.array([Decimal(0), Decimal("1e-10")], pa.decimal128(20, 10))
    assert x("{{ x }}", small) == ["0.0000000000", "0.0000000001"]
    many = pa.array([Decimal("0." + "1" * 30)])
    assert "more digits than a JSON number" in x("{{ x | tojson }}", many)[0]
    assert "template_error" in x("{{ x + 'a' }}", small)[0]
    assert "template_error" in x("{{ 'a' * x }}", small)[0]


def test_the_decimal_0_1_is_the_float_0_1() -> None:
    assert x("{{ x == 0.1 }} {{ x + 0.2 == 0.3 }}", pa.array([Decimal("0.10")])) == ["True True"]


def test_other_numbers_print_as_they_are_written() -> None:
    assert x("{{ x }}", pa.array([0.1, 1e-10], pa.float32())) == ["0.1", "1e-10"]
    assert x("{{ x }}", pa.array([0.1], pa.float16())) == ["0.1"]
    assert x("{{ x }}", pa.array([2**64 - 1], pa.uint64())) == ["18446744073709551615"]
    assert x("{{ x }}", pa.array([-(2**63)])) == ["-9223372036854775808"]
    assert x("{{ x }}", pa.array([True, False])) == ["True", "False"]


# Times


@pytest.mark.parametrize(
    ("kind", "number", "text"),
    [
        (pa.date32(), 3_000_000, "10183-09-21"),
        (pa.timestamp("ns"), 1, "1970-01-01 00:00:00.000000001"),
        (pa.timestamp("s"), 0, "1970-01-01 00:00:00"),
        (pa.timestamp("ms", "UTC"), 1, "1970-01-01 00:00:00.001Z"),
        (pa.timestamp("s", "+02:00"), 0, "1970-01-01 02:00:00+0200"),
        (pa.time64("ns"), 1, "00:00:00.000000001"),
        (pa.duration("us"), 259_200_500_000, "PT259200.5S"),
        (pa.duration("s"), -3, "-PT3S"),
    ],
)
def test_times_are_text_at_any_depth(kind: pa.DataType, number: int, text: str) -> None:
    array = pa.array([number], pa.int32() if kind.bit_width == 32 else pa.int64()).cast(kind)
    assert x("{{ x }}", array) == [text]
    struct = pa.StructArray.from_arrays([array], ["at"])
    listed = pa.ListArray.from_arrays([0, 1], struct)
    assert x("{{ x.at }}", struct) == [text]
    assert x("{{ x[0].at }}", listed) == [text]
    pairs = pa.MapArray.from_arrays([0, 1], pa.array(["k"]), array)
    assert x("{% for k, v in x %}{{ k }}={{ v }}{% endfor %}", pairs) == [f"k={text}"]


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (pa.timestamp("us"), 2**63 - 1),
        (pa.timestamp("us", "UTC"), -(2**63)),
        (pa.timestamp("s", "Europe/Berlin"), 2**63 - 1),
        (pa.date32(), 2**31 - 1),
        (pa.time64("us"), -1),
    ],
)
def test_an_impossible_time_is_an_error_of_its_row_where_it_is_used(
    kind: pa.DataType, number: int
) -> None:
    numbers = pa.array([0, number, 0], pa.int32() if kind.bit_width == 32 else pa.int64())
    array = numbers.cast(kind)
    good, bad, also_good = x("{{ x }}", array)
    assert good == also_good
    assert bad == f"invalid_prompt: column 'x': {kind} {number} is out of range"
    struct = pa.StructArray.from_arrays([array, pa.array(["a", "b", "c"])], ["at", "text"])
    assert x("{{ x.text }}", struct) == ["a", "b", "c"]
    assert "at of column 'x'" in x("{{ x.at | default('y') }}", struct)[1]
    plain = column_values(pa.chunked_array([struct]))
    assert [isinstance(value, RowError) for value in plain] == [False, True, False]


# Bytes and other types that are no text


def test_text_that_is_not_utf8_is_an_error_where_it_is_used() -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    said = "invalid_prompt: {}column 'x': the value is not valid UTF-8 text: invalid start byte"
    assert x("{{ x }}", strings) == ["good", said.format(""), "fine"]
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3]), strings)
    assert x("{{ x | join('+') }}", lists) == ["good", said.format("[] of ")]
    assert x("{{ x | length }}", lists) == ["1", "2"]
    assert x("{{ x is defined }} {{ x is none }}", strings)[1] == "True False"


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(16),
        pa.list_(pa.binary()),
        pa.struct([("a", pa.binary())]),
        pa.dictionary(pa.int8(), pa.binary()),
        pa.month_day_nano_interval(),
        pa.dense_union([pa.field("a", pa.int8())]),
        pa.timestamp("s", "Nowhere/City"),
        pa.struct([pa.field("a", pa.int8()), pa.field("a", pa.int8())]),
    ],
)
def test_a_column_that_no_row_can_use_is_refused(kind: pa.DataType) -> None:
    assert "prompt.template: column 'x' " in refusal("{{ x }}", kind)
    assert refusal("{% if x %}a{% endif %}", kind)
    assert refusal("{{ row['x'] }}", kind)


def test_a_struct_with_bytes_is_read_by_its_other_fields() -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": b"\x00", "path": "p"}, {"bytes": None, "path": "q"}, None], image)
    assert x("{{ x.path or '-' }}", rows) == ["p", "q", "-"]
    assert refusal("{{ x.path }}", image) == ""
    assert refusal("{% for i in x %}{{ i.path }}{% endfor %}", pa.list_(image)) == ""
    assert "column 'x'.bytes is binary" in refusal("{{ x.bytes }}", image)
    assert "printed with its part bytes" in refusal("{{ x }}", image)
    for source in ("{{ x | tojson }}", "{{ x.bytes | default('y') }}", "{{ x.bytes or 'y' }}"):
        assert x(source, rows)[0].startswith("invalid_prompt: bytes of column 'x' is binary")


def test_an_uuid_is_its_usual_text() -> None:
    text = "12345678-1234-5678-1234-567812345678"
    uuids = pa.array([bytes.fromhex(text.replace("-", "")), None], pa.uuid())
    assert x("{{ 'key ' ~ x }}", uuids) == [f"key {text}", NULL]
    assert refusal("{{ x }}", pa.uuid()) == ""


# What a type does not have


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ x.titel }}", "column 'x' has no .titel: did you mean 'title'?"),
        ("{{ x['zzz'] }}", "column 'x' has no [\"zzz\"]: its fields are title, tags, items, n"),
        ("{% if x.titel %}a{% endif %}", "did you mean 'title'?"),
        ("{{ x.title.name }}", "column 'x'.title has no .name: it is string"),
        ("{{ x.tags.first }}", "column 'x'.tags has no .first: it is list<"),
        ("{{ x.n[0] }}", "column 'x'.n has no [0]: it is int64"),
        ("{{ x[0] }}", "column 'x' has no [0]"),
        ("{{ x.items }}", 'write ["items"]'),
        ("{{ x.tags[0].a }}", "column 'x'.tags[0] has no .a"),
    ],
)
def test_what_the_type_of_a_column_does_not_have_is_refused(source: str, sentence: str) -> None:
    struct = [("title", pa.string()), ("tags", pa.list_(pa.string())), ("items", pa.int8())]
    assert sentence in refusal(source, pa.struct([*struct, ("n", pa.int64())]))


@pytest.mark.parametrize(
    "source",
    [
        "{{ x.title }} {{ x['items'] }} {{ x.tags[0] }} {{ x.title[:3] }} {{ x.title[0] }}",
        "{% for k, v in x.items() %}{{ k }}{% endfor %}{{ x.title.upper() }}{{ x.keys() | list }}",
        "{{ x.titel | default('none') }}{% if x.titel is defined %}a{% endif %}",
        "{% for x in x.tags %}{{ x.y }}{% endfor %}",
        "{{ x[y] }}{% set y = x %}{{ y.titel }}",
    ],
)
def test_what_the_type_of_a_column_may_have_is_left_to_the_row(source: str) -> None:
    struct = [("title", pa.string()), ("tags", pa.list_(pa.string())), ("items", pa.int8())]
    prompt = PromptSettings.model_validate({"template": source})
    check_references(prompt, pa.schema([("x", pa.struct(struct)), ("y", pa.string())]))


# What would take all memory for one row


@pytest.mark.parametrize(
    "source",
    [
        "{{ x * 10 ** 9 }}",
        "{{ 10 ** 9 * x }}",
        "{{ [x] * 10 ** 9 }}",
        "{{ 10 ** (10 ** 9) }}{{ x }}",
        "{{ x | center(10 ** 10) }}",
        "{{ x | indent(width=10 ** 10) }}",
        "{{ x.ljust(10 ** 10) }}",
        "{% for i in range(10 ** 9) %}{{ x }}{% endfor %}",
        "{% macro f(y) %}{{ f(y) }}{% endmacro %}{{ f(x) }}",
    ],
)
def test_what_grows_without_bound_is_an_error_of_its_row(source: str) -> None:
    (said,) = x(source, pa.array(["a"]))
    assert said.startswith("template_error")


def test_large_numbers_are_refused_as_widths() -> None:
    source = "{% macro f(y) %}{{ y }}{% endmacro %}{{ f(x) }} {{ x | round }}"
    assert x(source, pa.array([2**63 - 1])) == [f"{2**63 - 1} {2**63 - 1}"]


def test_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = "{% for i in range(9999) %}" * 3 + "{{ x }}" + "{% endfor %}" * 3
    for source in (loops, "{% set y %}" + loops + "{% endset %}"):
        (said,) = x(source, pa.array(["a"]))
        assert "steps over range() in one row" in said
    once = "{% for i in range(9999) %}{{ x }}{% endfor %}"
    assert x(once, pa.array(["a"] * 200)) == ["a" * 9999] * 200
    monkeypatch.setattr("batchinfer.prompt.bounds.MAX_CHARS", 9_000)
    assert "the text has more than" in x(once, pa.array(["a"]))[0]


# Every type


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def leaves() -> st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]]:
    int64 = st.integers(-(2**63), 2**63 - 1)
    int32 = st.integers(-(2**31), 2**31 - 1)
    zones = (None, "UTC", "Asia/Kolkata", "-07:00", "Nowhere/City")
    units = ("s", "ms", "us", "ns")
    times = [(pa.timestamp(unit, zone), int64) for unit in units for zone in zones]
    times += [(pa.duration(unit), int64) for unit in units]
    times += [(pa.date32(), int32), (pa.time32("ms"), int32), (pa.time64("ns"), int64)]
    digits = partial(st.decimals, min_value=-99, max_value=99, allow_nan=False)
    decimals = [
        (pa.decimal32(4), digits(places=0)),
        (pa.decimal128(20, 7), digits(places=7)),
        (pa.decimal256(70, 30), digits(places=30)),
    ]
    floats = [(pa.float64(), st.floats()), (pa.float32(), st.floats(width=32))]
    floats.append((pa.float16(), st.floats(width=16)))
    binary = st.binary(max_size=3)
    return st.sampled_from(
        [
            (pa.null(), st.none()),
            (pa.bool_(), st.booleans()),
            (pa.int64(), int64),
            (pa.uint64(), st.integers(0, 2**64 - 1)),
            (pa.int8(), st.integers(-128, 127)),
            (pa.string(), TEXTS),
            (pa.large_string(), TEXTS),
            (pa.string_view(), TEXTS),
            (pa.binary(), binary),
            (pa.large_binary(), binary),
            (pa.binary(2), st.binary(min_size=2, max_size=2)),
            (pa.uuid(), st.binary(min_size=16, max_size=16)),
            (pa.dictionary(pa.int32(), pa.string()), TEXTS),
            *times,
            *decimals,
            *floats,
        ]
    )


def holding(
    inner: st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]],
) -> st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]]:
    def of_list(entry: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
        kind, values = entry
        return pa.list_(kind), st.lists(st.none() | values, max_size=3)

    def of_pair(entry: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
        kind, values = entry
        pair = st.lists(st.none() | values, min_size=2, max_size=2)
        return pa.list_(kind, 2), pair

    def of_map(entry: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
        kind, values = entry
        return pa.map_(pa.string(), kind), st.lists(
            st.tuples(TEXTS, st.none() | values), max_size=3
        )

    def of_struct(fields: Mapping[str, tuple[pa.DataType, Any]]) -> tuple[pa.DataType, Any]:
        kinds = pa.struct([(name, kind) for name, (kind, _) in fields.items()])
        values = st.fixed_dictionaries({name: st.none() | v for name, (_, v) in fields.items()})
        return kinds, values

    structs = st.dictionaries(TEXTS.filter(bool), inner, min_size=1, max_size=3).map(of_struct)
    return inner.map(of_list) | inner.map(of_pair) | inner.map(of_map) | structs


@st.composite
def arrays(draw: st.DrawFn) -> pa.Array:
    kind, values = draw(st.recursive(leaves(), holding, max_leaves=4))
    rows = draw(st.lists(st.none() | values, min_size=1, max_size=5))
    array = made(rows, kind)
    return array.slice(draw(st.integers(0, len(rows) - 1)))


def made(rows: list[Any], kind: pa.DataType) -> pa.Array:
    """An array from numbers for times and bytes for UUIDs, which pyarrow makes at no depth."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(rows, kind.storage_type))
    if types.is_dictionary(kind):
        return pa.array(rows, kind.value_type).dictionary_encode()
    if types.is_temporal(kind):
        return pa.array(rows, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)
    if not types.is_nested(kind):
        return pa.array(rows, kind)
    is_null = pa.array([row is None for row in rows], pa.bool_())
    if types.is_struct(kind):
        children = [made([row and row[f.name] for row in rows], f.type) for f in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=is_null)
    if types.is_fixed_size_list(kind):
        flat = [entry for row in rows for entry in (row or [None, None])]
        return pa.FixedSizeListArray.from_arrays(made(flat, kind.value_type), 2, mask=is_null)
    flat = [entry for row in rows for entry in row or []]
    edges = np.cumsum([0, *(len(row or []) for row in rows)])
    offsets = pa.array(edges, pa.int32(), mask=np.array([*is_null.to_pylist(), False]))
    if types.is_list(kind):
        return pa.ListArray.from_arrays(offsets, made(flat, kind.value_type))
    keys, items = [k for k, _ in flat], made([v for _, v in flat], kind.item_type)
    return pa.MapArray.from_arrays(offsets, pa.array(keys, pa.string()), items)


def assert_plain(value: Any) -> None:
    if isinstance(value, list):
        for entry in value:
            assert_plain(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            assert type(key) is str
            assert_plain(entry)
    else:
        is_plain = type(value) in (str, int, float, bool, ExactNumber)
        assert is_plain or isinstance(value, Unreadable), value


@settings(max_examples=200, deadline=None)
@given(array=arrays())
def test_any_value_of_any_type_is_text_or_the_error_of_its_row(array: pa.Array) -> None:
    column = pa.chunked_array([array])
    values = template_values(column, "x", stand_in)
    assert len(values) == len(array)
    assert_plain(values)
    assert len(column_values(column)) == len(array)
    printed = x("{{ x }}", array)
    as_json = x("{{ x | tojson }}", array)
    x("{{ x[0] }}{{ x | default(1) }}{{ x.y }}{{ x | list }}{{ x * 2 }}", array)
    is_null = array.is_null().to_pylist()
    for null, text, document in zip(is_null, printed, as_json, strict=True):
        assert "None" not in text or "None" in f"{array}{array.type}"  # or a field of that name
        if null:
            assert (text, document) == (NULL, "null")
        if why_unreadable(array.type) and not pa.types.is_nested(array.type) and not null:
            assert text.startswith("invalid_prompt")
        if not document.startswith(("template_error", "invalid_prompt")):
            json.loads(document)


def test_values_come_in_the_order_of_their_chunks() -> None:
    chunks = pa.chunked_array([["a"], [], [None, "b"]])
    values = template_values(chunks, "x", stand_in)
    assert (values[0], values[2], values[1] == None) == ("a", "b", True)  # noqa: E711
    assert column_values(chunks) == ["a", None, "b"]
    assert column_values(pa.chunked_array([], pa.string())) == []
    day = pa.chunked_array([pa.array([dt.date(2026, 11, 28)])])
    assert column_values(day) == ["2026-11-28"]
