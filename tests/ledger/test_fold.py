"""No row lost, none twice: folds and finishes of any set of parts, in whatever order listed."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import SamplingSettings
from batchinfer.errors import ConfigError, InputError
from batchinfer.ledger import IncompleteShard, Ledger, PartId, fold, ledger, shard_fold, survey
from batchinfer.ledger.layout import PARTS_PREFIX, UNREADABLE_PREFIX, part_key
from batchinfer.sink import output_schema, write_table
from batchinfer.storage import FileInfo
from batchinfer.storage.local import LocalStore
from batchinfer.tasks import Generate

SHARD = "deep/a.parquet"
WINDOW_ROWS = 4
NUM_SAMPLES = 2
TASK = Generate(SamplingSettings())
SCHEMA = output_schema([pa.field("id", pa.string())], TASK.columns)

#: (row, sample) -> whether it is an error.
Rows = dict[tuple[int, int], bool]
Parts = dict[PartId, Rows]
#: (row, sample) -> (is_error, origin), in order.
Folded = dict[tuple[int, int], tuple[bool, str]]


class ShuffledStore(LocalStore):
    """Lists in any order: a fold may not depend on it."""

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[FileInfo]:
        found = [*super().list(prefix, recursive=recursive)]
        random.Random(len(found)).shuffle(found)
        return iter(found)


def table_of(rows: Rows, origin: str) -> pa.Table:
    """Results whose completion (or message) says where they come from."""
    keys = sorted(rows)
    is_error = [rows[key] for key in keys]
    columns: dict[str, Any] = {
        "id": [f"id {row}" for row, _ in keys],
        "shard": [SHARD] * len(keys),
        "row": [row for row, _ in keys],
        "sample": [sample for _, sample in keys],
        "completion": [None if failed else origin for failed in is_error],
        "error_type": ["prompt_too_long" if failed else None for failed in is_error],
        "error_message": [origin if failed else None for failed in is_error],
        "num_completion_tokens": [None if failed else 3 for failed in is_error],
        "num_prompt_tokens": [2] * len(keys),
    }
    arrays = [pa.array(columns.get(f.name, [None] * len(keys)), f.type) for f in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def origin_of(part: PartId) -> str:
    return part.name


def ledger_on(store: LocalStore, digest: str = "ours", run: int = 0) -> Ledger:
    return Ledger(
        store, {"digest": digest}, WINDOW_ROWS, num_samples=NUM_SAMPLES, task=TASK, run=run
    )


def publish(store: LocalStore, parts: Parts, finished: Rows | None = None, run: int = 0) -> Ledger:
    opened = ledger_on(store, run=run)
    if finished is not None:
        table = table_of(finished, "finished")
        opened.finish_directly(SHARD, SCHEMA, table, table.num_rows, lambda: None)
    for part, rows in parts.items():
        opened.publish_part(SHARD, part, table_of(rows, origin_of(part)))
    return opened


def expected_of(parts: Parts, finished: Rows | None = None) -> Folded:
    """The rule, said once more, plainly: success, then the finished file, then the earliest."""
    sources = [("finished", finished or {})]
    sources += [(origin_of(part), parts[part]) for part in sorted(parts, key=lambda p: p[1:])]
    folded: Folded = {}
    for origin, rows in sources:
        for key, is_error in rows.items():
            if key not in folded or (folded[key][0] and not is_error):
                folded[key] = (is_error, origin)
    return dict(sorted(folded.items()))


def counts_of(folded: Mapping[tuple[int, int], object]) -> list[int]:
    return np.bincount([row // WINDOW_ROWS for row, _ in folded]).tolist() if folded else []


def read_finished(store: LocalStore) -> Folded:
    table = pq.read_table(io.BytesIO(store.read(SHARD)))
    assert table.schema.remove_metadata() == SCHEMA
    records = table.to_pylist()
    folded: Folded = {}
    for record in records:
        is_error = record["error_type"] is not None
        origin = record["error_message"] if is_error else record["completion"]
        folded[record["row"], record["sample"]] = (is_error, origin)
        assert record["id"] == f"id {record['row']}"
    assert len(folded) == len(records), "a key came out twice"
    assert [*folded] == sorted(folded)
    return folded


def part_names(store: LocalStore, prefix: str = PARTS_PREFIX) -> list[str]:
    return sorted(found.key.rpartition("/")[2] for found in store.list(prefix))


def finish(opened: Ledger, num_expected: list[int]) -> None:
    opened.finish_shard(SHARD, SCHEMA, num_expected, lambda: None)


@st.composite
def some_parts(draw: st.DrawFn) -> Parts:
    key = st.tuples(st.integers(0, 11), st.integers(0, NUM_SAMPLES - 1))
    place = st.tuples(st.integers(1, 3), st.integers(1, 2))  # run, sequence
    parts: Parts = {}
    for (row, sample), (run, sequence), is_error in draw(
        st.lists(st.tuples(key, place, st.booleans()), max_size=40)
    ):
        part = PartId(row // WINDOW_ROWS, run, sequence)
        parts.setdefault(part, {})[row, sample] = is_error
    return dict(draw(st.permutations(list(parts.items()))))


finished_rows = st.none() | st.dictionaries(
    st.tuples(st.integers(0, 11), st.integers(0, NUM_SAMPLES - 1)), st.booleans(), max_size=24
)


@settings(max_examples=25, deadline=None)
@given(
    parts=some_parts(),
    finished=finished_rows,
    group_rows=st.sampled_from([1, 3, fold.MAX_ROW_GROUP_ROWS]),
)
def test_a_fold_has_every_row_once_and_the_best_of_it(
    parts: Parts, finished: Rows | None, group_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "MAX_ROW_GROUP_ROWS", group_rows)
        if group_rows == 1:  # and a batch of each file is a row, too
            patch.setattr(fold, "_CURSORS_BYTES", 1)
            patch.setattr(fold, "_MIN_BATCH_BYTES", 1)
        store = ShuffledStore(folder)
        opened = publish(store, parts, finished)
        expected = expected_of(parts, finished)
        totals = opened.finish_shard(SHARD, SCHEMA, counts_of(expected), lambda: None)
        assert read_finished(store) == expected
        assert totals.rows == len(expected)
        assert totals.rows_failed == sum(is_error for is_error, _ in expected.values())
        assert totals.counts["completion_tokens"] == 3 * (totals.rows - totals.rows_failed)
        assert opened.totals_of(SHARD) == totals
        assert part_names(store) == []


@settings(max_examples=10, deadline=None)
@given(finished=finished_rows.filter(lambda rows: rows is not None))
def test_a_fold_without_parts_changes_nothing(finished: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        opened = publish(store, {}, finished)
        before = pq.read_table(io.BytesIO(store.read(SHARD)))
        finish(opened, counts_of(finished))
        assert pq.read_table(io.BytesIO(store.read(SHARD))).equals(before)


@settings(max_examples=25, deadline=None)
@given(parts=some_parts(), finished=finished_rows, data=st.data())
def test_folding_in_two_steps_loses_nothing(
    parts: Parts, finished: Rows | None, data: st.DataObject
) -> None:
    is_first = {part: data.draw(st.booleans()) for part in parts}
    first = {part: rows for part, rows in parts.items() if is_first[part]}
    second = {part: rows for part, rows in parts.items() if not is_first[part]}
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        opened = publish(store, first, finished)
        finish(opened, counts_of(expected_of(first, finished)))
        publish(store, second)
        at_once = expected_of(parts, finished)
        finish(opened, counts_of(at_once))
        in_steps = read_finished(store)
    assert {k: v[0] for k, v in in_steps.items()} == {k: v[0] for k, v in at_once.items()}


@settings(max_examples=20, deadline=None)
@given(parts=some_parts())
def test_the_keys_of_parts_are_what_was_published(parts: Parts) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = ShuffledStore(folder)
        opened = publish(store, parts)
        listed = opened.parts_of(SHARD)
        assert listed == sorted(parts)
        keys = opened.keys_of_parts(SHARD, listed)
        succeeded = {k for rows in parts.values() for k, failed in rows.items() if not failed}
        failed = {k for rows in parts.values() for k, failed in rows.items() if failed}
        found = [*zip(keys.row.tolist(), keys.sample.tolist(), keys.is_error, strict=True)]
        assert {(row, sample) for row, sample, is_error in found if not is_error} == succeeded
        assert {(row, sample) for row, sample, is_error in found if is_error} == failed
        assert opened.num_rows_of_parts(SHARD) == sum(map(len, parts.values()))
        assert survey(store).with_parts == ({SHARD} if parts else set())


# Finishing

PARTS: Parts = {
    PartId(0, 1, 1): {(0, 0): False, (0, 1): True, (1, 0): False},
    PartId(0, 1, 2): {(1, 1): False},
    PartId(1, 2, 1): {(4, 0): False, (5, 1): False},
}
COUNTS = [4, 2]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "out"))


@pytest.mark.parametrize("counts", [[4, 3], [4, 1], [5, 1], [4], [4, 2, 1], []])
def test_a_shard_whose_counts_do_not_fit_is_not_published(
    store: LocalStore, counts: list[int]
) -> None:
    opened = publish(store, PARTS)
    with pytest.raises(IncompleteShard):
        finish(opened, counts)
    assert store.stat(SHARD) is None
    assert opened.parts_of(SHARD) == sorted(PARTS)
    with pytest.raises(IncompleteShard):
        opened.finish_directly(SHARD, SCHEMA, table_of({(0, 0): False}, "x"), 2, lambda: None)
    assert store.stat(SHARD) is None


def test_a_shard_that_changed_meanwhile_is_not_published(store: LocalStore) -> None:
    def recheck() -> NoReturn:
        raise InputError("the shard changed")

    opened = publish(store, PARTS)
    with pytest.raises(InputError):
        opened.finish_shard(SHARD, SCHEMA, COUNTS, recheck)
    assert store.stat(SHARD) is None
    assert opened.parts_of(SHARD) == sorted(PARTS)


def test_an_older_finished_file_stays_when_a_fold_does_not_fit(store: LocalStore) -> None:
    opened = publish(store, PARTS, {(0, 0): True})
    with pytest.raises(IncompleteShard):
        finish(opened, [3, 2])
    assert read_finished(store) == {(0, 0): (True, "finished")}


def test_parts_put_back_by_a_crash_before_the_deletes_change_nothing(store: LocalStore) -> None:
    opened = publish(store, PARTS)
    contents = {part_key(SHARD, part): store.read(part_key(SHARD, part)) for part in PARTS}
    finish(opened, COUNTS)
    finished = read_finished(store)
    for num_back in range(len(contents) + 1):  # the deletes go one by one
        for key in list(contents)[:num_back]:
            store.put(key, contents[key])
        finish(opened, COUNTS)
        assert part_names(store) == []
        assert {k: v[0] for k, v in read_finished(store).items()} == {
            k: v[0] for k, v in finished.items()
        }


def test_parts_that_add_nothing_to_a_finished_file_are_deleted(store: LocalStore) -> None:
    finished = {(0, 0): False, (0, 1): True, (5, 0): False}
    parts = {PartId(0, 1, 1): {(0, 0): False, (0, 1): True}, PartId(1, 1, 2): {(5, 0): True}}
    opened = publish(store, parts, finished)
    before = store.stat(SHARD)
    opened.settle(SHARD)
    assert store.stat(SHARD) == before
    assert part_names(store) == []


@settings(max_examples=12, deadline=None)
@given(parts=some_parts(), finished=finished_rows.filter(bool))
def test_settling_folds_in_results_for_errors_and_keeps_the_rest(
    parts: Parts, finished: Rows
) -> None:
    known = {p: {k: e for k, e in rows.items() if k in finished} for p, rows in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        opened = publish(store, known, finished)
        opened.settle(SHARD)
        assert read_finished(store) == expected_of(known, finished)
        assert part_names(store) == []


def test_a_window_of_very_many_parts_is_merged_in_steps(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MAX_OPEN_PARTS", 4)
    parts: Parts = {
        PartId(0, run, sequence): {(row, sample): run == 1}
        for run in (1, 2)
        for sequence, (row, sample) in enumerate(
            ((row, sample) for row in range(WINDOW_ROWS) for sample in range(NUM_SAMPLES)), start=1
        )
    }
    parts[PartId(1, 2, 9)] = {(4, 0): False}
    opened = publish(store, parts, run=9)
    most_open = 0
    open_cursors = shard_fold.Cursor

    def counted(*args: Any, **kwargs: Any) -> fold.Cursor:
        nonlocal most_open
        most_open = max(most_open, kwargs["rank"])
        return open_cursors(*args, **kwargs)

    monkeypatch.setattr(shard_fold, "Cursor", counted)
    finish(opened, [8, 1])
    assert read_finished(store) == expected_of(parts)
    assert most_open == 4
    assert part_names(store) == []


@settings(max_examples=10, deadline=None)
@given(parts=some_parts(), finished=finished_rows, limit=st.integers(2, 4))
def test_merging_keeps_every_key_and_every_success(
    parts: Parts, finished: Rows | None, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "MAX_OPEN_PARTS", limit)
        store = LocalStore(folder)
        opened = publish(store, parts, finished, run=9)
        expected = expected_of(parts, finished)
        finish(opened, counts_of(expected))
        assert {k: v[0] for k, v in read_finished(store).items()} == {
            k: v[0] for k, v in expected.items()
        }
        assert part_names(store) == []


def test_a_merge_killed_before_its_deletes_is_taken_up(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MAX_OPEN_PARTS", 2)
    parts: Parts = {PartId(0, 1, n + 1): {(n, 0): n == 1} for n in range(4)}
    opened = publish(store, parts, run=2)
    contents = {part_key(SHARD, part): store.read(part_key(SHARD, part)) for part in parts}
    with pytest.raises(IncompleteShard):  # so the merged parts stand
        finish(opened, [5])
    for key, content in contents.items():
        store.put(key, content)
    again = ledger_on(store, run=3)
    finish(again, [4])
    assert read_finished(store).keys() == expected_of(parts).keys()
    assert part_names(store) == []


# Parts that cannot be used


def tear(store: LocalStore, key: str) -> None:
    store.put(key, store.read(key)[:-40])


@pytest.mark.parametrize(
    "damage", ["torn", "empty", "garbage", "of another job", "foreign Parquet"]
)
def test_an_unusable_part_is_set_aside(store: LocalStore, damage: str) -> None:
    """A part that cannot be used is set aside and its rows count as not done."""
    opened = publish(store, PARTS)
    bad = PartId(0, 1, 1)
    key = part_key(SHARD, bad)
    if damage == "of another job":
        ledger_on(store, "theirs").publish_part(SHARD, bad, table_of(PARTS[bad], "theirs"))
    elif damage == "foreign Parquet":
        store.publish(key, lambda file: pq.write_table(table_of(PARTS[bad], "theirs"), file))
    elif damage == "torn":
        tear(store, key)
    else:
        store.put(key, b"" if damage == "empty" else b"PAR1" * 100)
    content = store.read(key)
    keys = opened.keys_of_parts(SHARD, opened.parts_of(SHARD))
    assert set(zip(keys.row.tolist(), keys.sample.tolist(), strict=True)) == {
        (1, 1),
        (4, 0),
        (5, 1),
    }
    assert bad not in opened.parts_of(SHARD)
    (aside,) = store.list(UNREADABLE_PREFIX)
    assert aside.key.endswith(f"/{bad.name}")
    assert store.read(aside.key) == content, "it is kept"


@pytest.mark.parametrize("is_torn", [True, False], ids=["torn", "of another job"])
def test_a_part_unusable_in_the_fold_is_set_aside(store: LocalStore, is_torn: bool) -> None:
    """A part found unusable by the fold is set aside and the shard not published."""
    opened = publish(store, PARTS)
    bad = PartId(1, 2, 1)
    if is_torn:
        tear(store, part_key(SHARD, bad))
    else:
        ledger_on(store, "theirs").publish_part(SHARD, bad, table_of(PARTS[bad], "theirs"))
    with pytest.raises(IncompleteShard):
        finish(opened, COUNTS)
    assert store.stat(SHARD) is None
    assert part_names(store, UNREADABLE_PREFIX) == [bad.name]
    again = PartId(1, 3, 1)
    opened.publish_part(SHARD, again, table_of(PARTS[bad], "again"))
    finish(opened, COUNTS)
    assert read_finished(store)[4, 0] == (False, "again")


def test_a_part_with_other_columns_than_its_neighbour_is_set_aside(store: LocalStore) -> None:
    opened = publish(store, PARTS)
    bad = PartId(0, 1, 2)
    with store.open(part_key(SHARD, bad)) as source:
        table = pq.ParquetFile(source).read()
    more = table.append_column("more", table["row"])
    store.publish(part_key(SHARD, bad), lambda file: pq.write_table(more, file))
    with pytest.raises(IncompleteShard):
        finish(opened, COUNTS)
    assert part_names(store, UNREADABLE_PREFIX) == [bad.name]


def test_a_torn_finished_file_is_named_and_what_to_do(store: LocalStore) -> None:
    opened = publish(store, PARTS, {(0, 0): True})
    tear(store, SHARD)
    with pytest.raises(ConfigError, match=r"is damaged: .*Move it away"):
        finish(opened, COUNTS)
    assert opened.parts_of(SHARD) == sorted(PARTS)


@pytest.mark.parametrize("use", ["settle", "fold"])
def test_a_copy_of_another_shards_finished_file_costs_no_part(store: LocalStore, use: str) -> None:
    opened = publish(store, PARTS)
    table = table_of({(0, 0): True}, "finished")
    opened.finish_directly("other.parquet", SCHEMA, table, 1, lambda: None)
    store.put(SHARD, store.read("other.parquet"))
    with pytest.raises(
        ConfigError, match=rf"is the finished file of other\.parquet, not of {SHARD}"
    ):
        opened.settle(SHARD) if use == "settle" else finish(opened, COUNTS)
    assert opened.parts_of(SHARD) == sorted(PARTS)


@pytest.mark.parametrize("use", ["keys", "fold"])
@pytest.mark.parametrize("place", [("other.parquet", 1), (SHARD, 0)], ids=["shard", "window"])
def test_a_copy_of_a_part_of_another_shard_or_window_is_set_aside(
    store: LocalStore, use: str, place: tuple[str, int]
) -> None:
    opened = publish(store, PARTS)
    shard, window = place
    source, bad = PartId(window, 9, 1), PartId(1, 9, 1)
    opened.publish_part(shard, source, table_of({(0, 0): False}, "copied"))
    store.put(part_key(SHARD, bad), store.read(part_key(shard, source)))
    store.delete([part_key(shard, source)])
    if use == "keys":
        assert len(opened.keys_of_parts(SHARD, [bad]).row) == 0
    else:
        finish(opened, COUNTS)
        assert read_finished(store) == expected_of(PARTS)
    assert part_names(store, UNREADABLE_PREFIX) == [bad.name]


def test_a_part_that_vanishes_while_it_is_folded_is_looked_for_again(store: LocalStore) -> None:
    opened = publish(store, PARTS, {(0, 0): False})
    shared = PartId(0, 2, 7)
    opened.publish_part(SHARD, shared, table_of({(0, 0): False}, "twice"))

    class Vanishing(LocalStore):
        has_vanished = False

        def open(self, key: str) -> Any:
            if key == part_key(SHARD, shared) and not self.has_vanished:
                self.has_vanished = True
                self.delete([key])
            return super().open(key)

    finish(ledger_on(Vanishing(store.url)), COUNTS)
    assert read_finished(store) == expected_of(PARTS, {(0, 0): False})


def test_an_empty_table_is_a_part_and_a_finished_file(store: LocalStore) -> None:
    opened = ledger_on(store)
    empty = SCHEMA.empty_table()
    store.publish("x.part", lambda file: write_table(file, empty, {"digest": "ours"}))
    opened.publish_part(SHARD, PartId(0, 1, 1), empty)
    finish(opened, [0])
    assert read_finished(store) == {}
    opened.finish_directly(SHARD, SCHEMA, None, 0, lambda: None)
    assert read_finished(store) == {}
