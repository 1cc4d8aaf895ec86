"""Whatever an input path comes upon is read, refused by its name, or said once to be left out."""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import ConfigError, InputError
from batchinfer.source import ShardReader, list_shards, matches, read_footer
from batchinfer.storage import S3Options, open_store
from tests.support.endings import changed, must_fail
from tests.support.jobs import Place, job, results, rows, run, write_job
from tests.support.s3_server import S3Server

TABLE = pa.table({"n": [1, 2]})


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLE, path)


def names(*paths: object, opener: Any = open_store) -> list[str]:
    shards = list_shards([str(path) for path in paths], opener)
    for shard in shards:
        assert matches([str(path) for path in paths], shard.url), shard.url
    return [shard.name for shard in shards]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# Folders


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["a.parquet", "b.parquet/part-0.parquet", "b.parquet/x=1/part-1.parquet"]),
        ("b*", ["b.parquet/part-0.parquet", "b.parquet/x=1/part-1.parquet"]),
        ("**/*.parquet", ["a.parquet", "b.parquet/part-0.parquet", "b.parquet/x=1/part-1.parquet"]),
        ("b.parquet", ["part-0.parquet", "x=1/part-1.parquet"]),
    ],
)
def test_a_folder_that_is_named_like_a_file_is_read_like_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str, found: list[str]
) -> None:
    parts = tmp_path / "b.parquet"
    write(tmp_path / "a.parquet", parts / "part-0.parquet", parts / "x=1" / "part-1.parquet")
    (parts / "_SUCCESS").touch()
    (parts / ".part-0.parquet.crc").touch()
    (parts / "_metadata").touch()
    assert names(tmp_path / pattern) == found
    assert warnings(caplog) == []


def test_such_a_folder_below_another_wildcard_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "day=1" / "b.parquet" / "part-0.parquet", tmp_path / "day=2" / "c.parquet")
    found = ["day=1/b.parquet/part-0.parquet", "day=2/c.parquet"]
    assert names(tmp_path / "*" / "*.parquet") == found


def test_other_folders_that_match_are_reported_once_and_never_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.parquet", tmp_path / "deep" / "b.parquet", tmp_path / "more" / "c.parquet")
    assert names(tmp_path / "*") == ["a.parquet"]
    (said,) = warnings(caplog)
    assert "a folder" in said and f"{tmp_path}/deep, {tmp_path}/more" in said
    write(tmp_path / "x" / "y" / "z.parquet")
    caplog.clear()
    assert names(tmp_path / "*" / "*") == ["deep/b.parquet", "more/c.parquet"]
    assert f"{tmp_path}/x/y" in warnings(caplog)[0]
    with pytest.raises(InputError, match=rf"nothing matches .* a folder .*{tmp_path}/deep"):
        names(tmp_path / "de*")


def test_a_folder_named_like_a_file_without_any_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").mkdir()
    write(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: a folder without any \.parquet file"):
        names(tmp_path / "*.parquet")


# Names


def test_files_with_other_endings_are_reported_once_with_a_few_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.parquet")
    others = ["b.pq", "c.parq", "d.PARQUET", "e.parquet.gz", "f.parquet.tmp", "g.csv", "h.json"]
    for name in others:
        shutil.copy(tmp_path / "a.parquet", tmp_path / name)
    assert names(tmp_path) == ["a.parquet"]
    (said,) = warnings(caplog)
    assert "does not end in .parquet" in said and "and 2 more" in said
    assert all(f"{tmp_path}/{name}" in said for name in others[:5])
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match=r"nothing matches .* not end in \.parquet.*b\.pq"):
        names(tmp_path)


def test_hidden_files_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = [tmp_path / ".c.parquet", tmp_path / "_b.parquet", tmp_path / "_tmp" / "d.parquet"]
    write(tmp_path / "a.parquet", *hidden)
    for path in (tmp_path, tmp_path / "**"):
        caplog.clear()
        assert names(path) == ["a.parquet"]
        (said,) = warnings(caplog)
        assert "begins with _ or ." in said and all(str(file) in said for file in hidden)
    caplog.clear()
    assert names(tmp_path / "*.parquet") == ["a.parquet"]
    assert "_b.parquet" in warnings(caplog)[0] and "d.parquet" not in warnings(caplog)[0]
    assert names(tmp_path / "_b.parquet") == ["_b.parquet"]


@pytest.mark.parametrize("name", ["run[1]", "what?", "st*r", "open[", "a]b"])
def test_a_name_with_wildcards_that_is_there_is_that_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write(tmp_path / name / "a.parquet", tmp_path / name / "day=1" / "b.parquet")
    shutil.copy(tmp_path / name / "a.parquet", tmp_path / f"{name}.parquet")
    assert names(tmp_path / name) == ["a.parquet", "day=1/b.parquet"]
    assert names(tmp_path / name / "*.parquet") == ["a.parquet"]
    assert names(tmp_path / name / "a.parquet") == ["a.parquet"]
    assert names(f"{tmp_path}/{name}/day=1/") == ["b.parquet"]
    assert names(tmp_path / f"{name}.parquet") == [f"{name}.parquet"]
    assert warnings(caplog) == []


def test_what_such_a_name_would_match_as_a_pattern_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "run[1]" / "a.parquet", tmp_path / "run1" / "b.parquet")
    for path in (tmp_path / "run[1]" / "*.parquet", tmp_path / "run[1]" / "a.parquet"):
        assert names(path) == ["a.parquet"]
    said = warnings(caplog)
    assert len(said) == 1 and f"{tmp_path}/run1/b.parquet" in said[0]
    assert names(tmp_path / "run[[]1]" / "*.parquet") == ["run[1]/a.parquet"]
    with pytest.raises(InputError, match=r"for the character \[ write \[\[\]"):
        names(tmp_path / "run[2]" / "*.parquet")


def test_odd_names_are_read_and_named_in_one_line(tmp_path: Path) -> None:
    odd = [
        "a b .parquet",
        "a#b+c%20.parquet",
        "line\nbreak.parquet",
        "\u00e4.parquet",
        "a\u0308.parquet",
    ]
    odd += ["A.parquet", "a.parquet", "\x1b[1m.parquet", "x" * 200 + ".parquet"]
    write(*(tmp_path / name for name in odd))
    assert names(tmp_path) == sorted(odd)
    for shard in list_shards([str(tmp_path)], open_store):
        assert read_footer(shard).num_rows == 2


def test_a_name_that_is_not_text_is_refused_readably(
    filled: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = os.fsencode(filled.url("in"))
    shutil.copy(folder + b"/s0.parquet", folder + b"/caf\xe9.parquet")
    path = write_job(tmp_path, job(filled))
    for command in ("validate", "run"):
        ended = run(path, command=(command,))
        assert ended.code == 2 and "Traceback" not in ended.stderr
        assert r"in/caf\xe9.parquet: the name is not valid UTF-8" in ended.stderr
    os.rename(folder + b"/caf\xe9.parquet", folder + b"/_caf\xe9.parquet")  # noqa: PTH104
    assert names(filled.url("in")) == ["s0.parquet"]
    assert r"_caf\xe9.parquet" in warnings(caplog)[0]


def test_an_output_that_is_not_text_is_refused(filled: Place, tmp_path: Path) -> None:
    settings = changed(job(filled), output={"path": filled.url("a\nb")})
    must_fail(run(write_job(tmp_path, settings)), 2, r"a\nb", "control characters")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 234 + ".parquet", "1 bytes too long for a file system"),
        ("ä" * 117 + ".parquet", "1 bytes too long for a file system"),
        ("_SUCCESS/a.parquet", "records of its own at _SUCCESS"),
        ("_batchinfer/a.parquet", "records of its own at _batchinfer"),
    ],
)
def test_a_name_that_no_result_can_have_is_refused(
    filled: Place, tmp_path: Path, name: str, words: str
) -> None:
    filled.write_parquet(f"in/{name}", rows(1))
    settings = changed(job(filled), input={"path": filled.url("in", "_*/*.parquet")})
    path = write_job(tmp_path, settings if "/" in name else job(filled))
    must_fail(run(path), 2, words, "Rename it")


def test_the_longest_name_that_is_not_refused_is_computed(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet(f"in/{'x' * 233}.parquet", rows(100))
    ended = run(write_job(tmp_path, job(folder)), "--limit", "60")
    assert ended.code == 0, ended.stderr  # parts
    assert run(write_job(tmp_path, job(folder))).code == 0
    assert results(folder).height == 100


# Links, pipes, permissions


def test_links_and_pipes_where_files_should_be_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    odd = tmp_path / "b.parquet"
    for make, words in (
        (lambda: os.mkfifo(odd), "a pipe, a socket or a device"),
        (lambda: odd.symlink_to("nowhere"), "a link to nothing"),
        (lambda: odd.symlink_to(odd), "a link to nothing"),
        (lambda: odd.symlink_to("/dev/null"), "a pipe, a socket or a device"),
    ):
        make()
        for path in (tmp_path, tmp_path / "*.parquet"):
            with pytest.raises(InputError, match=words):
                names(path)
        with pytest.raises(ConfigError, match=r"nothing matches|symbolic links"):
            names(odd)
        odd.rename(tmp_path / ".b.lock")  # whoever does not look like input is no one's business
        assert names(tmp_path) == ["a.parquet"]
        (tmp_path / ".b.lock").unlink()


def test_links_up_the_tree_end_and_files_that_are_read_twice_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "day=1" / "a.parquet")
    (tmp_path / "day=1" / "up").symlink_to(tmp_path)
    assert names(tmp_path) == ["day=1/a.parquet"]
    assert warnings(caplog) == []
    (tmp_path / "latest").symlink_to("day=1")
    assert names(tmp_path / "*" / "*.parquet") == ["day=1/a.parquet", "latest/a.parquet"]
    (said,) = warnings(caplog)
    assert f"{tmp_path}/latest/a.parquet (the same as {tmp_path}/day=1/a.parquet)" in said


# Hive folders


@pytest.mark.parametrize("path", ["day=2026-11-21/*.parquet", "day=2026-11-21", "**/*.parquet"])
def test_a_hive_folder_is_a_column_wherever_the_wildcard_is(tmp_path: Path, path: str) -> None:
    write(tmp_path / "day=2026-11-21" / "a.parquet")
    (shard,) = list_shards([str(tmp_path / path)], open_store)
    with ShardReader(shard, ["day", "n"]) as reader:
        (block,) = reader.blocks(0, 2)
    assert block.table.to_pydict() == {"day": ["2026-11-21"] * 2, "n": [1, 2]}


def test_a_column_of_the_file_goes_before_a_folder_outside_the_pattern(tmp_path: Path) -> None:
    write(tmp_path / "n=9" / "day=1" / "day=2" / "a.parquet")
    for path in ("n=9/day=1/*/*.parquet", "n=9/day=1/day=2/a.parquet"):
        (shard,) = list_shards([str(tmp_path / path)], open_store)
        assert read_footer(shard).partitions == {"day": "2"}
        with ShardReader(shard, ["n"]) as reader:
            (block,) = reader.blocks(0, 2)
        assert block.table.to_pydict() == {"n": [1, 2]}


# Tables


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("_delta_log/00000000000000000000.json", r"a Delta table \(_delta_log\)"),
        (".hoodie/hoodie.properties", r"a Hudi table \(\.hoodie\)"),
        ("metadata/v1.metadata.json", r"an Iceberg table \(metadata\)"),
        ("_spark_metadata/0", r"Spark stream \(_spark_metadata\)"),
    ],
)
def test_the_folder_of_a_table_is_refused_from_above_within_and_below(
    tmp_path: Path, log: str, words: str
) -> None:
    table = tmp_path / "tables" / "t"
    write(table / "data" / "day=1" / "a.parquet", tmp_path / "tables" / "u" / "b.parquet")
    (table / log).parent.mkdir()
    (table / log).touch()
    day = table / "data" / "day=1"
    for path in (
        tmp_path / "tables",
        tmp_path / "tables" / "t*" / "data" / "*" / "*.parquet",
        table,
        table / "**",
        table / "data" / "day=1" / "*.parquet",
        day,
    ):
        with pytest.raises(InputError, match=f"tables/t is .*{words}"):
            names(path)
    assert names(day / "a.parquet") == ["a.parquet"]
    assert names(tmp_path / "tables" / "u*" / "*.parquet") == ["u/b.parquet"]


def test_a_folder_called_metadata_alone_is_not_a_table(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", tmp_path / "metadata" / "b.parquet")
    assert names(tmp_path) == ["a.parquet", "metadata/b.parquet"]


# S3


@pytest.mark.s3
def test_on_s3_the_same_is_read_refused_and_said(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    opener = partial(open_store, s3=S3Options(endpoint_url=server.url))
    root = f"s3://{server.create_bucket()}"
    bucket = opener(root)

    def put(*keys: str) -> None:
        for key in keys:
            bucket.put(key, b"x")

    put("in/a.parquet", "in/b.parquet/part-0.parquet", "in/_c.parquet", "in/d.pq", "in/deep/e.csv")
    assert names(f"{root}/in/*.parquet", opener=opener) == ["a.parquet", "b.parquet/part-0.parquet"]
    assert "_c.parquet" in warnings(caplog)[0]
    caplog.clear()
    assert names(f"{root}/in", opener=opener) == ["a.parquet", "b.parquet/part-0.parquet"]
    assert len(warnings(caplog)) == 2 and f"{root}/in/d.pq, {root}/in/deep/e.csv" in str(
        warnings(caplog)
    )
    put("mixed/a.parquet", "mixed//b.parquet", "mixed/sub//c.parquet", "mixed/../d.parquet")
    for path in ("mixed", "mixed/**/*.parquet"):
        with pytest.raises(InputError) as caught:
            names(f"{root}/{path}", opener=opener)
        assert "mixed//b.parquet" in str(caught.value) and "part of the key is empty" in str(
            caught.value
        )
    assert names(f"{root}/mixed/*.parquet", opener=opener) == ["a.parquet"]
    with pytest.raises(InputError, match="part of the key is empty"):
        names(f"{root}/mixed//b.parquet", opener=opener)
    put("run[1]/a.parquet", "run1/b.parquet")
    assert names(f"{root}/run[1]/*.parquet", opener=opener) == ["a.parquet"]
    assert names(f"{root}/run[1]/a.parquet", opener=opener) == ["a.parquet"]
    put("t/_delta_log/0.json", "t/day=1/x.parquet")
    for path in ("t", "t/day=1/*.parquet", "t/*/*.parquet"):
        with pytest.raises(InputError, match=f"{root}/t is a Delta table"):
            names(f"{root}/{path}", opener=opener)
    with pytest.raises(ConfigError, match="bucket's name"):
        names("s3://b*/x.parquet", opener=opener)


@pytest.fixture
def filled(folder: Place) -> Place:
    folder.write_parquet("in/s0.parquet", rows(3))
    return folder


def test_what_is_left_out_is_a_warning_of_validate_and_of_the_json_line(
    filled: Place, tmp_path: Path
) -> None:
    filled.write_parquet("in/_s1.parquet", rows(3))
    path = write_job(tmp_path, job(filled))
    assert "_s1.parquet" in run(path, command=("validate",)).stdout
    ended = run(path)
    assert ended.code == 0 and len(ended.result["warnings"]) == 1
    assert "_s1.parquet" in ended.result["warnings"][0]


def test_a_file_that_would_be_a_folder_of_the_output_is_refused(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("a/b.parquet", rows(1))
    folder.write_parquet("c/b.parquet/d.parquet", rows(1))
    settings = changed(job(folder), input={"path": [folder.url("a"), folder.url("c")]})
    must_fail(run(write_job(tmp_path, settings)), 2, "b.parquet would be a file and a folder")
    assert isinstance(results(folder), pl.DataFrame)
