"""Shards are found, refused and read as the user means, and in bounded memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from batchinfer.errors import ConfigError, InputError, TransientError
from batchinfer.source import (
    Fingerprint,
    RowFilter,
    Shard,
    ShardReader,
    check_columns,
    list_shards,
    matches,
    read_footer,
    same_content,
)
from batchinfer.storage import S3Options, Store, open_store
from tests.support.s3_server import s3_server

DEMO = Path(__file__).parents[2] / "jobs" / "demo" / "prompts"


def write(path: Path, table: pa.Table | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if table is not None else pa.table({"n": [1, 2, 3]}), path, **options)
    return path


def names(*paths: object) -> list[str]:
    return [shard.name for shard in list_shards([str(path) for path in paths], open_store)]


def only_shard(path: Path) -> Shard:
    (shard,) = list_shards([str(path)], open_store)
    return shard


def read(reader: ShardReader, *bounds: tuple[int, int]) -> tuple[list[int], pa.Table]:
    blocks = [block for start, stop in bounds for block in reader.blocks(start, stop)]
    rows = [row for block in blocks for row in block.rows.tolist()]
    return rows, pa.concat_tables([block.table for block in blocks])


# Listing


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "a.parquet",
        "b.parquet",
        "year=2024/x.parquet",
        "year=2025/deep/y.parquet",
        "_tmp/no.parquet",
        ".hidden/no.parquet",
        "_no.parquet",
    ):
        write(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.parquet", ["a.parquet"]),
        ("", ["a.parquet", "b.parquet", "year=2024/x.parquet", "year=2025/deep/y.parquet"]),
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("[!b].parquet", ["a.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("_*.parquet", ["_no.parquet"]),
        ("**", ["a.parquet", "b.parquet", "year=2024/x.parquet", "year=2025/deep/y.parquet"]),
        ("**/[xy].parquet", ["year=2024/x.parquet", "year=2025/deep/y.parquet"]),
        ("year=*/*.parquet", ["year=2024/x.parquet"]),
        ("year=2025/**/*.parquet", ["deep/y.parquet"]),
    ],
)
def test_a_path_means_these_shards_and_matches_agrees(
    tree: Path, pattern: str, found: list[str]
) -> None:
    path = str(tree / pattern)
    shards = list_shards([path], open_store)
    assert [shard.name for shard in shards] == found
    urls = {shard.url for shard in shards}
    for file in tree.rglob("*.parquet"):
        assert matches([path], str(file)) == (str(file) in urls), file


def test_a_folder_that_ends_in_parquet_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "data.parquet" / "part-0.parquet")
    (tmp_path / "data.parquet" / "_SUCCESS").touch()
    assert names(tmp_path / "data.parquet") == ["part-0.parquet"]


def test_relative_paths_and_links_are_recognised_as_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert matches(["link/*.parquet"], str(tmp_path / "real" / "x.parquet"))
    assert matches(["real"], str(tmp_path / "link" / "deep" / "x.parquet"))
    assert not matches(["real/*.parquet"], str(tmp_path / "real" / "deep" / "x.parquet"))
    assert not matches(["s3://bucket/real"], str(tmp_path / "real" / "x.parquet"))


def test_partitions_come_from_folders_below_the_glob(tmp_path: Path) -> None:
    write(tmp_path / "lang=de" / "topic=a%2Fb" / "x.parquet")
    (shard,) = list_shards([str(tmp_path)], open_store)
    assert shard.partitions == (("lang", "de"), ("topic", "a/b"))
    with ShardReader(shard, ["topic", "n"]) as reader:
        assert reader.schema.field("topic").type == pa.string()
        _, table = read(reader, (0, 3))
    assert table.to_pydict() == {"topic": ["a/b"] * 3, "n": [1, 2, 3]}


@pytest.mark.parametrize("inside", ["day=1", "day=2", "day=2/*/day=3"])
def test_folders_of_one_name_with_several_values_are_refused_wherever_they_are(
    tmp_path: Path, inside: str
) -> None:
    write(tmp_path / "day=1" / inside.replace("*", "x") / "x.parquet")
    (shard,) = list_shards([str(tmp_path / "day=1" / "**" / "*.parquet")], open_store)
    if inside == "day=1":
        with ShardReader(shard, ["day"]) as reader:
            assert read(reader, (0, 1))[1].to_pydict() == {"day": ["1"]}
        return
    with pytest.raises(InputError, match=r"give 'day' [23] values \(1, 2"):
        ShardReader(shard, ["day"])
    with ShardReader(shard, ["n"]) as reader:  # nobody asks for it
        assert reader.schema.names == ["n"]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32(), 0), pa.struct([("a", pa.list_(pa.int8(), 0))])]
)
def test_lists_of_the_fixed_size_0_are_named_as_that(tmp_path: Path, kind: pa.DataType) -> None:
    values: list[Any] = [[], None] if pa.types.is_fixed_size_list(kind) else [{"a": []}, None]
    write(tmp_path / "x.parquet", pa.table({"n": [1, 2], "x": pa.array(values, kind)}))
    shard = only_shard(tmp_path)
    with pytest.raises(InputError, match=r"'x' has lists of the fixed size 0"):
        ShardReader(shard, ["x"])
    with ShardReader(shard, ["n"]) as reader:
        assert read(reader, (0, 2))[1].to_pydict() == {"n": [1, 2]}


def test_a_partition_column_with_other_values_in_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "n=1" / "x.parquet")
    with ShardReader(only_shard(tmp_path), ["n"]) as reader, pytest.raises(InputError, match="n=1"):
        read(reader, (0, 3))
    write(path, pa.table({"n": [1, 1]}))
    with ShardReader(only_shard(tmp_path), ["n"]) as reader:
        assert read(reader, (0, 2))[1].to_pydict() == {"n": ["1", "1"]}


@pytest.mark.parametrize(
    ("folder", "values"),
    [
        ("n=03", pa.array([3, 3], pa.int32())),
        ("n=True", pa.array([True])),
        ("n=1e-3", pa.array([0.001])),
        ("n=2026-11-21", pa.array(["2026-11-21"]).cast(pa.date32())),
        ("n=2026-11-21 10%3A00%3A00.000000", pa.array([1795255200], pa.timestamp("s"))),
        ("n=2026-11-21", pa.array([1795219200000], pa.timestamp("ms", "UTC"))),
        ("n=1.5", pa.array(["1.50"]).cast(pa.decimal128(10, 2))),
        ("n=b", pa.array(["b", "b"]).dictionary_encode()),
        ("n=__HIVE_DEFAULT_PARTITION__", pa.array([None], pa.list_(pa.string()))),
    ],
)
def test_a_folder_and_a_column_agree_in_the_type_of_the_column(
    tmp_path: Path, folder: str, values: pa.Array
) -> None:
    write(tmp_path / folder / "x.parquet", pa.table({"n": values}))
    shard = only_shard(tmp_path)
    check_columns(read_footer(shard), ["n"], shard)
    text = dict(shard.partitions)["n"]
    expected = [None if text.startswith("__") else text] * len(values)
    with ShardReader(shard, ["n"]) as reader:
        assert read(reader, (0, len(values)))[1].column("n").to_pylist() == expected


@pytest.mark.parametrize(
    "values",
    [
        pa.array([["3"]]),
        pa.array([{"a": 3}]),
        pa.array([[("a", 3)]], pa.map_(pa.string(), pa.int64())),
        pa.array([3], pa.duration("s")),
        pa.array([3], pa.time32("s")),
        pa.array([4], pa.int8()),
        pa.array([None], pa.int8()),
        pa.nulls(1),
        pa.array([], pa.list_(pa.string())),
    ],
)
def test_a_folder_contradicting_its_column_is_refused_early(
    tmp_path: Path, values: pa.Array
) -> None:
    """A folder that its column contradicts is refused before the rows are read."""
    write(tmp_path / "n=3" / "x.parquet", pa.table({"n": values, "text": values}))
    shard = only_shard(tmp_path)
    with pytest.raises(InputError, match=r"'n' in the file .* its folder n=3"):
        check_columns(read_footer(shard), ["n"], shard)
    check_columns(read_footer(shard), ["text"], shard)  # who does not need it is not bothered


def test_a_null_folder_contradicts_values(tmp_path: Path) -> None:
    write(tmp_path / "n=__HIVE_DEFAULT_PARTITION__" / "x.parquet", pa.table({"n": [None, 5]}))
    with ShardReader(only_shard(tmp_path), ["n"]) as reader, pytest.raises(InputError):
        read(reader, (0, 2))


def test_two_folders_of_one_name_are_refused_unless_they_agree(tmp_path: Path) -> None:
    write(tmp_path / "day=1" / "day=2" / "x.parquet")
    shard = only_shard(tmp_path)
    with pytest.raises(InputError, match=r"give 'day' 2 values \(1, 2\)"):
        check_columns(read_footer(shard), ["day"], shard)
    (tmp_path / "day=1" / "day=2").rename(tmp_path / "day=1" / "day=1")
    shard = only_shard(tmp_path)
    check_columns(read_footer(shard), ["day"], shard)


def test_folder_names_are_unquoted_and_other_percent_signs_stay(tmp_path: Path) -> None:
    write(tmp_path / "a=50%" / "b=x=y%20z" / "c=%FF" / "=no" / "d=" / "x.parquet")
    partitions = only_shard(tmp_path).partitions
    assert partitions == (("a", "50%"), ("b", "x=y z"), ("c", "%FF"), ("d", ""))


def test_nothing_matching_names_the_path_and_the_deepest_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=rf"exists is {tmp_path}/a$"):
        names(tmp_path / "a" / "b" / "*.parquet")
    with pytest.raises(InputError, match=r"has no such \.parquet file"):
        names(tmp_path / "a")


def test_shards_with_one_name_are_refused_with_both_and_a_remedy(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.parquet")
    write(tmp_path / "b" / "x.parquet")
    with pytest.raises(InputError) as caught:
        names(tmp_path / "a", tmp_path / "b")
    for part in (f"{tmp_path}/a/x.parquet", f"{tmp_path}/b/x.parquet", f"{tmp_path}/**/*.parquet"):
        assert part in str(caught.value)


def test_one_file_by_two_paths_is_one_shard_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.parquet")
    assert names(tmp_path / "a", tmp_path / "a" / "x.parquet") == ["x.parquet"]
    with pytest.raises(InputError, match="matched twice"):
        names(tmp_path / "a", tmp_path)


def test_a_file_that_is_not_parquet_by_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet")
    (tmp_path / "notes.txt").touch()
    assert names(tmp_path) == ["x.parquet"]
    for path in (tmp_path / "*", tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=r"notes\.txt"):
            names(path)


@pytest.mark.s3
def test_shards_on_s3_are_listed_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        bucket = server.create_bucket()
        open_s3 = partial(open_store, s3=S3Options(endpoint_url=server.url))
        store = open_s3(f"s3://{bucket}/in")
        content = next(DEMO.iterdir()).read_bytes()
        store.put("day=1/a.parquet", content)
        store.put("day=1/_b.parquet", content)
        for path in (f"s3://{bucket}/in", f"s3://{bucket}/in/day=*/*.parquet"):
            (shard,) = list_shards([path], open_s3)
            assert shard.name == "day=1/a.parquet"
            assert matches([path], shard.url)
        with ShardReader(shard, ["id", "day"]) as reader:
            rows, table = read(reader, (0, 300))
        assert rows == list(range(300))
        assert table.column("day").unique().to_pylist() == ["1"]
        store.delete(["day=1/a.parquet"])
        with pytest.raises(InputError, match="vanished"):
            read_footer(shard)


# Footers


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda whole: whole[:-100], "truncated"),
        (lambda whole: whole[:6], "truncated"),
        (lambda whole: b"id,text\n1,hello world\n", "not a Parquet file"),
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[:8] + whole[-8:], "truncated"),
        (lambda whole: whole[:-4] + b"PARE", "encrypted"),
        (lambda whole: whole[:-400] + b"\xff" * 392 + whole[-8:], "damaged"),
    ],
)
def test_a_torn_file_is_refused_with_its_name(
    tmp_path: Path, content: Callable[[bytes], bytes], sentence: str
) -> None:
    path = write(tmp_path / "x.parquet")
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=sentence) as caught:
        read_footer(only_shard(path))
    assert str(path) in str(caught.value)


def test_a_footer_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"n": range(5000)}), row_group_size=2)
    footer = read_footer(only_shard(path))
    assert footer.num_rows == 5000
    assert [group.first_row for group in footer.row_groups] == list(range(0, 5000, 2))


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    shard = only_shard(write(tmp_path / "x.parquet", pa.table({"description": ["a"]})))
    with pytest.raises(
        InputError, match=r"no column 'descripton' \(did you mean 'description'\?\)"
    ):
        check_columns(read_footer(shard), ["descripton"], shard)


def test_a_column_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["n", "n"])
    shard = only_shard(write(tmp_path / "x.parquet", table))
    with pytest.raises(InputError, match="2 columns named 'n'"):
        check_columns(read_footer(shard), ["n"], shard)


def test_content_is_the_same_after_a_touch_and_another_after_a_rewrite(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"n": [1, 2, 3]}))
    shard = only_shard(path)
    footer = read_footer(shard)
    old = Fingerprint(shard.name, shard.size_bytes, shard.version, 3, footer.sha256)
    os.utime(path, ns=(1, 1))
    assert only_shard(path).version != old.version
    assert same_content(old, only_shard(path))
    write(path, pa.table({"n": [1, 2, 4]}))
    assert only_shard(path).size_bytes == old.size_bytes
    assert not same_content(old, only_shard(path))
    write(path, pa.table({"n": [1, 2, 3, 4]}))
    assert not same_content(old, only_shard(path))


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """A file with a plain footer of whose columns only `text` is encrypted."""

    class Keys(encryption.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, name: str) -> str:
            return key.hex()

    properties = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="key", column_keys={"key": ["text"]}, plaintext_footer=True
        ),
    )
    texts = [f"plain {n}" for n in range(1000)]
    table = pa.table({"id": range(1000), "text": texts, "plain": texts})
    return write(tmp_path / "x.parquet", table, encryption_properties=properties)


def test_encrypted_columns_are_named_and_the_others_are_read(encrypted: Path) -> None:
    shard = only_shard(encrypted)
    footer = read_footer(shard)
    with pytest.raises(InputError, match="encrypted columns: text cannot be read"):
        check_columns(footer, ["id", "text"], shard)
    with pytest.raises(InputError, match="encrypted"):
        ShardReader(shard, ["text"])
    check_columns(footer, ["id", "plain"], shard)
    with ShardReader(shard, ["plain"]) as reader:
        rows, table = read(reader, (0, 1000))
    assert rows == list(range(1000)) and table.column("plain")[999].as_py() == "plain 999"


def test_a_page_that_is_not_as_its_checksum_says_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"p{number}" for number in range(100, 300)]})
    pq.write_table(table, file, write_page_checksum=True, compression="none", use_dictionary=False)
    content = file.read_bytes()
    assert content.count(b"p150") == 1
    file.write_bytes(content.replace(b"p150", b"p950"))
    with ShardReader(only_shard(file), ["text"]) as reader, pytest.raises(InputError):
        list(reader.blocks(0, reader.num_rows))


def test_a_filter_does_not_compare_uuids_with_text(tmp_path: Path) -> None:
    values = pa.array([b"0" * 16], pa.uuid())
    pq.write_table(pa.table({"text": ["a"], "uuid": values}), tmp_path / "a.parquet")
    schema = read_footer(only_shard(tmp_path / "a.parquet")).schema
    with pytest.raises(ConfigError, match="column 'uuid' holds UUIDs"):
        RowFilter("uuid <> '30303030-3030-3030-3030-303030303030'").check(schema)


def test_a_column_nested_too_deeply_is_not_damage(tmp_path: Path) -> None:
    kind: pa.DataType = pa.int64()
    for _ in range(60):
        kind = pa.list_(kind)
    pq.write_table(pa.table({"text": ["a"], "deep": pa.nulls(1, kind)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a column that is nested too deeply"):
        read_footer(only_shard(tmp_path / "a.parquet"))


def test_a_footer_whose_row_counts_differ_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"n": range(300)}), row_group_size=7)
    content = path.read_bytes()
    count = b"\x16\xd8\x04"  # 300, in the footer before the row groups
    place = content.index(count, len(content) - int.from_bytes(content[-8:-4], "little") - 8)
    path.write_bytes(content[: place + 1] + b"\xd6" + content[place + 2 :])
    with pytest.raises(InputError, match="row counts disagree"):
        read_footer(only_shard(path))


# Reading


def test_windows_give_every_row_once_whatever_the_row_groups(tmp_path: Path) -> None:
    table = pa.table({"n": range(1000), "text": [f"row {n}" * (n % 7) for n in range(1000)]})
    shard = only_shard(write(tmp_path / "x.parquet", table, row_group_size=130))
    windows = [(start, min(start + 64, 1000)) for start in range(0, 1000, 64)]
    with ShardReader(shard, ["text", "n"], max_block_bytes=600) as reader:
        rows, found = read(reader, *windows)
        assert rows == list(range(1000))
        assert found.equals(table.select(["text", "n"]))
        assert read(reader, (500, 501))[0] == [500]  # going back
        assert read(reader, (900, 910), (990, 1000))[0] == [*range(900, 910), *range(990, 1000)]
        assert list(reader.blocks(1000, 1000)) == []


def test_an_empty_shard_has_no_blocks(tmp_path: Path) -> None:
    shard = only_shard(write(tmp_path / "x.parquet", pa.table({"n": pa.array([], pa.int64())})))
    with ShardReader(shard, ["n"]) as reader:
        assert reader.num_rows == 0
        assert list(reader.blocks(0, 0)) == []


def test_nothing_is_asked_for_behind_the_last_row_of_a_row_group(tmp_path: Path) -> None:
    """Arrow aborts the process there, for an extension of a dictionary."""
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    labelled = pa.ExtensionArray.from_storage(pa.opaque(words.type, "word", "tests"), words)
    pq.write_table(pa.table({"word": labelled}), tmp_path / "x.parquet", row_group_size=1)
    with ShardReader(only_shard(tmp_path / "x.parquet"), ["word"]) as reader:
        (block,) = reader.blocks(0, 3)
    assert block.table.column("word").to_pylist() == ["a", "b", "a"]


def test_no_columns_still_give_rows(tmp_path: Path) -> None:
    with ShardReader(only_shard(write(tmp_path / "x.parquet")), []) as reader:
        (block,) = reader.blocks(0, 3)
    assert block.rows.tolist() == [0, 1, 2]
    assert block.table.num_rows == 3


def test_text_is_plain_whoever_wrote_it(tmp_path: Path) -> None:
    texts = ["a", None, "b", "a"]
    table = pa.table(
        {
            "large": pa.array(texts, pa.large_string()),
            "view": pa.array(texts, pa.string_view()),
            "dictionary": pa.array(texts).dictionary_encode(),
            "lists": pa.array([["a"], None, [], ["b"]], pa.large_list(pa.large_string())),
            "structs": pa.array(
                [{"role": "user"}, None, {}, {}], pa.struct([("role", pa.large_string())])
            ),
            "n": pa.array([1, 2, 3, 4], pa.int16()),
        }
    )
    shard = only_shard(write(tmp_path / "x.parquet", table))
    with ShardReader(shard, table.column_names) as reader:
        _, found = read(reader, (0, 4))
        assert found.schema.equals(reader.schema)
    kinds = [str(kind).replace("element", "item") for kind in found.schema.types]
    lists, structs = "list<item: string>", "struct<role: string>"
    assert kinds == ["string", "string", "string", lists, structs, "int16"]
    assert found.to_pydict() == table.to_pydict()


def test_a_column_whose_name_has_a_dot_is_itself(tmp_path: Path) -> None:
    table = pa.table({"a": [1], "a.b": ["x"]})
    with ShardReader(only_shard(write(tmp_path / "x.parquet", table)), ["a"]) as reader:
        assert read(reader, (0, 1))[1].to_pydict() == {"a": [1]}


def test_damage_inside_the_file_is_an_input_error_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"text": [str(n) * 50 for n in range(2000)]}))
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with ShardReader(only_shard(path), ["text"]) as reader, pytest.raises(InputError) as caught:
        read(reader, (0, 2000))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("writer", ["plain", "compressed", "encrypted"])
def test_damage_of_any_bit_is_read_or_refused_and_ends_no_process(
    tmp_path: Path, encrypted: Path, writer: str
) -> None:
    path, names = encrypted, ["id", "plain"]
    if writer != "encrypted":
        values = [1, None] * 20
        columns = {
            "id": pa.array(values),
            "text": [f"row {n} " * 3 for n in range(40)],
            "word": pa.array(["a", "b"] * 20).dictionary_encode(),
            "list": pa.array([[1, 2], None] * 20),
            "struct": [{"a": 1, "b": ["x"]}] * 40,
            "map": pa.array([[("k", 1)]] * 40, pa.map_(pa.string(), pa.int64())),
            "uuid": pa.array([bytes(16), None] * 20, pa.uuid()),
            "time": pa.array(values, pa.timestamp("us", "UTC")),
        }
        of_writer: dict[str, Any] = {"write_page_index": True, "compression": "none"}
        if writer == "compressed":
            of_writer = {"data_page_version": "2.0", "use_dictionary": False, "compression": "zstd"}
        path = write(tmp_path / "y.parquet", pa.table(columns), row_group_size=20, **of_writer)
        names = list(columns)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.damage", str(path), "700", *names],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "read" in done.stdout and "refused" in done.stdout


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(tmp_path: Path) -> None:
    table = pa.table({"text": [os.urandom(4000).hex() for _ in range(2000)]})
    path = write(tmp_path / "x.parquet", table, row_group_size=500, compression="none")
    with ShardReader(only_shard(path), ["text"]) as reader:
        read(reader, (0, 500))
        os.truncate(path, 5_000_000)
        with pytest.raises(InputError, match=r"x\.parquet"):
            read(reader, (500, 2000))
    with pytest.raises(InputError, match="changed while it was read"):
        read_footer(Shard("x.parquet", open_store(str(tmp_path)), "x.parquet", 1, "1"))


class _DownStore:
    """A store whose connection is lost after the footer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_down = False

    def open(self, key: str) -> BinaryIO:
        outer, file = self, self._store.open(key)

        class Reader:
            closed = False

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def read(self, size: int = -1) -> bytes:
                if outer.is_down:
                    raise TransientError("the store is down")
                return file.read(size)

        return cast(BinaryIO, Reader())

    def url_of(self, key: str) -> str:
        return self._store.url_of(key)


def test_an_error_of_the_store_keeps_its_class(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet")
    store = _DownStore(open_store(str(tmp_path)))
    shard = Shard("x.parquet", cast(Store, store), "x.parquet", path.stat().st_size, "1")
    with ShardReader(shard, ["n"]) as reader:
        store.is_down = True
        with pytest.raises(TransientError):
            read(reader, (0, 3))


_PEAK = """
import re, sys
from pathlib import Path
import pyarrow as pa
from batchinfer.source import ShardReader, list_shards
from batchinfer.storage import open_store
def peak_kb():  # not getrusage: that one starts at the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
pa.set_memory_pool(pa.system_memory_pool())
(shard,) = list_shards([sys.argv[1]], open_store)
before = peak_kb()
with ShardReader(shard, ["text"]) as reader:
    rows = sum(len(b.rows) for s in range(0, reader.num_rows, 16384)
               for b in reader.blocks(s, min(s + 16384, reader.num_rows)))
print(rows, (peak_kb() - before) // 1024)
"""


def test_one_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    piece = pa.array([os.urandom(1500).hex() for _ in range(1000)])
    table = pa.table({"text": pa.chunked_array([piece] * 105)})
    options = {"use_dictionary": False, "compression": "none"}
    path = write(tmp_path / "x.parquet", table, **options)
    footer = read_footer(only_shard(path))
    assert len(footer.row_groups) == 1
    assert footer.row_groups[0].size_bytes > 300_000_000
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True
    )
    rows, growth_mb = map(int, done.stdout.split())
    assert rows == 105_000
    assert growth_mb < 120, growth_mb


# Filters


def schema() -> pa.Schema:
    return pa.schema({"n": pa.int64(), "description": pa.string(), "b": pa.bool_()})


@pytest.mark.parametrize(
    "sql",
    [
        "n > avg(n)",
        "count(*) > 1",
        "n in (1, 2) and n > max(n)",
        "row_number() over (order by n) > 2",
        "n > sum(n) over (partition by description)",
        "rank() over (order by n) > 1",
        "lag(n) over (order by n) > 1",
        "round(avg(n), 1) > 1",
        "first(n) > 1",
    ],
)
def test_a_filter_that_looks_at_other_rows_is_refused(sql: str) -> None:
    with pytest.raises(ConfigError, match="not row-wise"):
        RowFilter(sql)


@pytest.mark.parametrize(
    ("sql", "name"),
    [
        ("n = 1_000", "_000"),
        ("n > 0 and_b", "and_b"),
        ("n > 0 OR b AS x", "x"),
        ('n BETWEEN 1 AND 2 "and b" -- or so', "and b"),
    ],
)
def test_a_name_that_a_filter_ends_with_is_refused(sql: str, name: str) -> None:
    """SQL reads it as a column's name, and what it was meant for would be dropped."""
    with pytest.raises(ConfigError, match=f"{name!r} at its end as a name"):
        RowFilter(sql)


HASHES = pa.table({"u": pa.array([3, None, 2**64 - 1], pa.uint64()), "n": [1, 2, 3]})


@pytest.mark.parametrize(
    "sql", ["u * u > 1", "n > 2 AND u * u < 0", "POW(u, 2) > 4", "CAST(u AS HUGEINT) * u * n > 1"]
)
def test_a_product_beyond_128_bits_is_an_error_where_it_changes_the_answer(sql: str) -> None:
    """polars goes on with what is left of it."""
    row_filter = RowFilter(sql)
    with pytest.raises(InputError, match=f"u = {2**64 - 1}.* a product needs more than 128 bits"):
        row_filter.mask(HASHES)
    assert row_filter.mask(HASHES.slice(0, 2)).tolist()[1] is False


@pytest.mark.parametrize(
    ("sql", "passing"),
    [
        ("u * 31 % 10 = 5", [False, False, True]),  # as doubles it would be 2
        ("u * 2 = 36893488147419103230", [False, False, True]),
        ("CAST(u AS DOUBLE) * u > 10", [False, False, True]),
        ("n * n IN (1, 4) AND NOT u * u > 1e300", [True, False, False]),
        ("POW(n, 2) > 1", [False, True, True]),
    ],
)
def test_products_of_large_integers_are_exact(sql: str, passing: list[bool]) -> None:
    assert RowFilter(sql).mask(HASHES).tolist() == passing


@pytest.mark.parametrize(
    ("sql", "passing"),
    [
        ("n > 1", [False, True, False, True]),
        ("n % 2 = 0 or description in ('a')", [True, True, False, False]),
        ("length(description) > 1 and not b", [False, False, False, True]),
        ("description like 'b%'", [False, True, False, False]),
        ("description is null", [False, False, True, False]),
        ("case when n / 2 > 1 then true else b end", [True, False, False, True]),
        ("n > 0 or true", [True] * 4),
        ("b", [True, False, False, False]),
    ],
)
def test_a_filter_passes_rows_where_it_is_true_and_null_is_not(
    sql: str, passing: list[bool]
) -> None:
    table = pa.table(
        {
            "n": [1, 2, None, 3],
            "description": ["a", "bb", None, "cc"],
            "b": [True, None, None, False],
        },
        schema=schema(),
    )
    row_filter = RowFilter(sql)
    row_filter.check(schema())
    assert row_filter.mask(table).tolist() == passing
    by_row = [row_filter.mask(table.slice(i, 1)).tolist()[0] for i in range(4)]
    assert by_row == passing


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("n >", "not a SQL expression"),
        ("n > 1; drop table x", "not a SQL expression"),
        ("descripton = 'a'", "did you mean 'description'"),
        ("n + 1", "not true or false"),
        ("description > 1", "does not fit"),
        ("false", "reads no column"),
        ("'n' = 1", "reads no column.*double quotes"),
    ],
)
def test_a_filter_that_cannot_work_says_why(sql: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RowFilter(sql).check(schema())


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("at > '2026-01-01'", "to a string value. Write times as DATE '2026-01-31'"),
        ("zoned > TIMESTAMP '2026-01-01'", "CAST(column AS TIMESTAMP), which is in UTC"),
        ("date(at) = DATE '2026-01-01'", "CAST(column AS DATE)"),
        ("date(day) = DATE '2026-01-01'", "STRPTIME(column, '%Y-%m-%d')"),
    ],
)
def test_a_filter_of_times_that_polars_refuses_says_how_to_write_it(
    sql: str, sentence: str
) -> None:
    """And what it says to write works."""
    zone = pa.timestamp("us", "Europe/Berlin")
    names = {"at": pa.timestamp("us"), "zoned": zone, "day": pa.string()}
    with pytest.raises(ConfigError) as refusal:
        RowFilter(sql).check(pa.schema(names))
    assert sentence in str(refusal.value) and "python" not in str(refusal.value)
    noon = datetime(2026, 1, 31, 12)  # noqa: DTZ001 - the column has no zone
    table = pa.table({"at": [noon], "zoned": pa.array([noon], zone), "day": ["2026-01-31"]})
    for advised in (
        "at > DATE '2026-01-30'",
        "CAST(zoned AS TIMESTAMP) = TIMESTAMP '2026-01-31 12:00:00'",
        "CAST(at AS DATE) = DATE '2026-01-31'",
        "STRPTIME(day, '%Y-%m-%d') = DATE '2026-01-31'",
    ):
        row_filter = RowFilter(advised)
        row_filter.check(table.schema)
        assert row_filter.mask(table).tolist() == [True], advised


@pytest.mark.parametrize(
    "clock",
    [
        "current_date",
        "current_timestamp",
        "CURRENT_TIMESTAMP()",
        "localtimestamp",
        "localtime",
        "current_time",
        "now()",
        "NOW /* it's */ ()",
        '"now"()',
        "current_date - interval '1 day'",
    ],
)
def test_a_filter_that_asks_the_clock_would_keep_other_rows_at_each_start(clock: str) -> None:
    for sql in (f"ts < {clock}", f"{clock} > ts", f"t = 'it''s' or ts < {clock}"):
        with pytest.raises(ConfigError, match=r"depends on the current time"):
            RowFilter(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "ts < timestamp '2026-01-31 12:00:00'",
        "t = 'current_date' or t = 'it''s now()'",
        '"current_date" > 1',
        "now > 1 -- now()",
        "current_dates > 1",
    ],
)
def test_what_is_only_called_like_the_clock_may_be_in_a_filter(sql: str) -> None:
    RowFilter(sql)


def test_a_filter_too_long_to_be_planned_is_refused_and_a_long_list_is_not() -> None:
    values = [f"'r{number}'" for number in range(3000)]
    with pytest.raises(ConfigError, match=r"2,999 operators \(AND, OR.*IN \("):
        RowFilter(" or ".join(f"id = {value}" for value in values))
    found = RowFilter(f"id in ({', '.join(values)})")
    found.check(pa.schema({"id": pa.string()}))
    assert found.mask(pa.table({"id": ["r2999", "r3000", " or "]})).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "sql",
    [
        "t " + "|| 'a' " * 1000 + "= 'b'",
        "n " + "+ 1 " * 2000 + "> 3",
        "n " + "- 1 " * 2000 + "> 3",
        "case " + " ".join(f"when n = {n} then true" for n in range(2000)) + " else false end",
    ],
)
def test_a_chain_of_any_operator_is_refused(sql: str) -> None:
    """polars plans it by recursion: 1,000 `||` ended the process without a word."""
    with pytest.raises(ConfigError, match=r"[12],000 operators"):
        RowFilter(sql)


def test_ten_thousand_values_of_a_list_are_not_a_chain() -> None:
    found = RowFilter(f"n not in ({', '.join(str(-n) for n in range(10_000))})")
    found.check(pa.schema({"n": pa.int64()}))
    assert found.mask(pa.table({"n": [-9_999, -10_000, 1]})).tolist() == [False, True, True]


def test_a_filter_on_a_type_unknown_to_polars_is_refused_early() -> None:
    """A filter on a type that polars cannot read is refused before there are rows."""
    for kind in (pa.decimal256(60, 2), pa.timestamp("us", "Nowhere/City")):
        with pytest.raises(ConfigError, match=r"does not fit"):
            RowFilter("x IS NOT NULL").check(pa.schema([("x", kind)]))


def test_columns_of_any_name_are_read_and_filtered(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        name: [name, name] for name in ("a.b", "a b", 'q"', "n\nl", "{{ x }}", "list.element")
    }
    columns |= {"a": [{"b": "field"}] * 2, "list": [["x"]] * 2}
    shard = only_shard(write(tmp_path / "x.parquet", pa.table(columns)))
    for name, values in columns.items():
        quoted = name.replace('"', '""')
        row_filter = RowFilter(f'"{quoted}" IS NOT NULL')
        with ShardReader(shard, [name], row_filter) as reader:
            row_filter.check(reader.schema)
            _, table = read(reader, (0, 2))
        assert table.to_pydict() == {name: values}


def test_a_filter_sees_partition_columns_and_its_columns_need_not_be_read(tmp_path: Path) -> None:
    write(tmp_path / "lang=de" / "x.parquet", pa.table({"n": [1, 2, 3], "text": list("abc")}))
    row_filter = RowFilter("lang = 'de' and n <> 2")
    shard = only_shard(tmp_path)
    row_filter.check(read_footer(shard).schema, ["lang"])
    with ShardReader(shard, ["text"], row_filter) as reader:
        rows, table = read(reader, (0, 3))
    assert rows == [0, 2]
    assert table.to_pydict() == {"text": ["a", "c"]}


def test_a_value_that_the_filter_cannot_compute_names_shard_and_rows(tmp_path: Path) -> None:
    shard = only_shard(write(tmp_path / "x.parquet", pa.table({"text": ["1", "x"]})))
    with (
        ShardReader(shard, ["text"], RowFilter("cast(text as int) > 0")) as reader,
        pytest.raises(InputError, match=r"x\.parquet, rows 0 to 1"),
    ):
        read(reader, (0, 2))


def test_the_demo_shards_are_read_as_pyarrow_reads_them(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    for shard in list_shards([str(tmp_path)], open_store):
        with ShardReader(shard, ["id", "description"]) as reader:
            rows, table = read(reader, (0, 100), (100, reader.num_rows))
        assert np.array_equal(rows, np.arange(reader.num_rows))
        assert table.equals(pq.read_table(shard.url).select(["id", "description"]))
