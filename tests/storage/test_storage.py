"""What every Store does alike, and what only the local one does."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import ConfigError, InputError, TransientError
from batchinfer.storage import Store, is_s3, join_url, local, open_store, split_url, why_no_folder
from batchinfer.storage.local_errors import CheckedFile, os_errors
from batchinfer.storage.urls import check_url
from tests.support.fault_proxy import fault_proxy
from tests.support.s3_server import s3_server

MIB = 1024 * 1024

PUBLISHER = """
import sys, time
from batchinfer.storage import open_store

def write(file):
    file.write(bytes(20 * 1024 * 1024))
    file.flush()
    print("halfway", flush=True)
    time.sleep(60)

open_store(sys.argv[1]).publish("deep/shard.parquet", write)
"""


@pytest.fixture(scope="module")
def environment_and_bucket() -> Iterator[tuple[dict[str, str], str]]:
    with s3_server() as server, fault_proxy(server.url) as proxy:
        yield server.environment(proxy.url), server.create_bucket()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    if request.param == "local":
        url = f"{tmp_path}/root"
    else:
        environment, bucket = request.getfixturevalue("environment_and_bucket")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{bucket}/{tmp_path.name}/root"
    opened = open_store(url, retry_s=5)
    yield opened
    opened.close()


def keys_of(store: Store, prefix: str = "", *, recursive: bool = True) -> list[str]:
    return [found.key for found in store.list(prefix, recursive=recursive)]


def write_and_fail(file: BinaryIO) -> NoReturn:
    file.write(bytes(20 * MIB))
    raise RuntimeError("the fold went wrong")


def test_a_missing_folder_is_an_empty_listing(store: Store) -> None:
    assert keys_of(store) == []
    assert keys_of(store, "no/such/") == []


def test_what_is_put_is_listed_and_read_back(store: Store) -> None:
    store.put("a/b.json", b"old")
    before = store.stat("a/b.json")
    store.put("a/b.json", b"content")
    found = store.stat("a/b.json")
    assert found and before and found.size_bytes == 7 and found.version != before.version
    assert list(store.list()) == [found]
    assert store.read("a/b.json") == b"content"
    assert store.url_of("a/b.json") == f"{store.url}/a/b.json"


def test_the_listing_is_in_the_order_of_whole_keys(store: Store) -> None:
    keys = ["a-b/x", "a.txt", "a/x", "a/y/z", "a0", "b é ~+%", "b"]
    for key in keys:
        store.put(key, b"")
    assert keys_of(store) == sorted(keys)
    assert keys_of(store, "a") == ["a-b/x", "a.txt", "a/x", "a/y/z", "a0"]
    assert keys_of(store, "a/") == ["a/x", "a/y/z"]
    assert keys_of(store, "a", recursive=False) == ["a.txt", "a0"]
    assert keys_of(store, "a/", recursive=False) == ["a/x"]


def test_what_is_missing_is_reported_as_missing(store: Store) -> None:
    store.put("folder/file", b"x")
    for key in ("nothing", "folder", "folder/file/below"):
        assert store.stat(key) is None
        with pytest.raises(FileNotFoundError):
            store.read(key)
        with pytest.raises(FileNotFoundError):
            store.open(key)
    store.delete(["nothing", "folder/file/below"])


def test_deleting_removes_the_given_keys_and_no_other(store: Store) -> None:
    for key in ("a/1", "a/2", "a/3"):
        store.put(key, b"x")
    store.delete(f"a/{number}" for number in (1, 3))
    assert keys_of(store) == ["a/2"]


def test_emptied_folders_go_while_others_write(
    tmp_path: Path,
) -> None:
    """Folders that a deletion leaves empty go while others write into them."""
    store = open_store(str(tmp_path))
    store.put("other/file", b"x")

    def put_and_delete(number: int) -> None:
        for _ in range(100):
            store.put(f"parts/shard/{number}", b"x")
            assert store.read(f"parts/shard/{number}") == b"x"
            store.delete([f"parts/shard/{number}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_and_delete, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    store.delete(["other/file"])
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_folder_that_somebody_makes_and_removes_meanwhile_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, taken = Path.mkdir, ["parts", "shard"]

    def made_by_another(folder: Path, *arguments: Any, **options: Any) -> None:
        if folder.name in taken:  # and gone again as soon as it is looked at
            taken.remove(folder.name)
            raise FileExistsError(errno.EEXIST, "File exists", str(folder))
        make(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", made_by_another)
    store = open_store(str(tmp_path))
    store.put("parts/shard/1", b"x")
    assert store.read("parts/shard/1") == b"x" and not taken


def test_a_key_is_created_once(store: Store) -> None:
    assert store.create("runs/0001.json", b"first")
    assert not store.create("runs/0001.json", b"second")
    assert store.create("runs/0001.json", b"first"), "our own create, whose reply was lost"
    assert store.read("runs/0001.json") == b"first"
    assert keys_of(store) == ["runs/0001.json"]


def test_of_eight_creators_one_wins(store: Store) -> None:
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return store.create("lease", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert store.read("lease") == b"%d" % won.index(True)


def test_the_probe_for_create_if_absent_leaves_nothing(store: Store) -> None:
    assert store.supports_create("probe-1")
    store.put("probe-2", b"left by a killed probe")
    assert store.supports_create("probe-2")
    assert keys_of(store) == []


def test_a_published_file_replaces_the_old_one_and_is_seekable(store: Store) -> None:
    store.put("out/shard.parquet", b"old")
    table = pa.table({"row": range(100_000), "text": [f"text {row}" for row in range(100_000)]})
    store.publish("out/shard.parquet", lambda file: pq.write_table(table, file))
    with store.open("out/shard.parquet") as file:
        assert pq.read_table(file).equals(table)
    with store.open("out/shard.parquet") as file:
        file.seek(-4, io.SEEK_END)
        assert (file.read(), file.read()) == (b"PAR1", b"")
        assert (file.seek(0), file.read(4), file.tell()) == (0, b"PAR1", 4)


@pytest.mark.parametrize("num_bytes", [100, 20 * MIB], ids=["one request", "an upload of parts"])
def test_what_is_published_once_is_not_replaced(store: Store, num_bytes: int) -> None:
    def write(letter: bytes) -> bool:
        return store.publish_once("deep/file", lambda file: file.write(letter * num_bytes) and None)

    assert write(b"a")
    assert not write(b"b")
    assert store.read("deep/file") == b"a" * num_bytes
    store.publish("deep/file", lambda file: file.write(b"c") and None)
    assert store.read("deep/file") == b"c"
    assert keys_of(store) == ["deep/file"]
    assert store.sweep(lambda _: True) == 0, "nothing is left of what lost"


def test_of_eight_that_publish_once_one_wins(store: Store) -> None:
    def write(number: int) -> bool:
        return store.publish_once("x", lambda file: file.write(b"%d" % number) and None)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    if store.is_local:
        assert sum(won) == 1
    assert store.read("x") in {b"%d" % n for n, is_ours in enumerate(won) if is_ours}


def test_a_writer_that_fails_publishes_nothing(store: Store) -> None:
    store.put("shard.parquet", b"old")
    with pytest.raises(RuntimeError, match="the fold went wrong"):
        store.publish("shard.parquet", write_and_fail)
    assert store.read("shard.parquet") == b"old"
    assert store.sweep(lambda key: True) == 0


def test_a_killed_publisher_leaves_nothing_visible_and_is_swept(store: Store) -> None:
    publisher = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, store.url], stdout=subprocess.PIPE, text=True
    )
    with publisher:
        assert publisher.stdout and publisher.stdout.readline() == "halfway\n"
        publisher.send_signal(signal.SIGKILL)
    store.put("deep/other", b"x")
    assert keys_of(store) == ["deep/other"]
    assert store.sweep(lambda key: key == "deep/other") == 0
    assert store.sweep(lambda key: key == "deep/shard.parquet") == 1
    assert store.sweep(lambda key: True) == 0
    assert keys_of(store) == ["deep/other"]


_names = st.text("a-.!0~é\U00010000", min_size=1, max_size=3).filter(
    lambda name: name not in {".", ".."}
)
_keys = st.lists(_names, min_size=1, max_size=3).map("/".join)


@settings(max_examples=100, deadline=None)
@given(st.sets(_keys, max_size=12), _keys)
def test_local_order_is_key_order(
    tmp_path_factory: pytest.TempPathFactory, drawn: set[str], prefix: str
) -> None:
    keys = {key for key in drawn if not any(other.startswith(f"{key}/") for other in drawn)}
    root = tmp_path_factory.mktemp("root")
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).touch()
    store = open_store(str(root))
    assert keys_of(store) == sorted(keys)
    for some in (prefix, prefix[:1], prefix.rpartition("/")[0] + "/"):
        below = sorted(key for key in keys if key.startswith(some)) if some != "/" else []
        assert some == "/" or keys_of(store, some) == below
        direct = [key for key in below if "/" not in key[len(some) :]]
        assert some == "/" or keys_of(store, some, recursive=False) == direct


def test_a_full_disk_is_a_reason_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    monkeypatch.setattr(local, "CheckedFile", lambda path, mode: CheckedFile("/dev/full", "wb"))
    for write in (lambda file: file.write(b"x"), lambda file: file.write(bytes(5 * MIB))):
        with pytest.raises(TransientError, match="disk full while writing"):
            store.publish("shard.parquet", write)
    with pytest.raises(TransientError, match="disk full while writing"):
        store.create("lease", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "num_inodes", "words"),
    [
        (errno.ENOSPC, 0, r"no inodes left \(see `df -i`\), though bytes are free: delete files"),
        (errno.ENOSPC, 5, "disk full while writing"),
        (errno.EDQUOT, 5, "quota used up while writing"),
    ],
)
def test_what_is_used_up_is_named(
    number: int, num_inodes: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may be full of files as well as of bytes."""
    has = SimpleNamespace(f_files=100, f_favail=num_inodes, f_bavail=10_000)
    monkeypatch.setattr(os, "statvfs", lambda path: has)
    with pytest.raises(TransientError, match=words), os_errors("write", tmp_path / "x"):
        raise OSError(number, os.strerror(number))


def test_pyarrow_hands_a_full_disk_on_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "CheckedFile", lambda path, mode: CheckedFile("/dev/full", "wb"))
    table = pa.table({"text": [os.urandom(MIB).hex()]})
    with pytest.raises(TransientError, match="disk full while writing"):
        open_store(str(tmp_path)).publish("x.parquet", lambda file: pq.write_table(table, file))


@pytest.mark.parametrize(
    ("number", "expected", "match"),
    [
        (errno.EDQUOT, TransientError, "quota used up while writing .*shard"),
        (errno.EIO, TransientError, "cannot write .*shard"),
        (errno.EROFS, ConfigError, "cannot write .*shard"),
    ],
)
def test_a_failing_fsync_publishes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: type[Exception],
    match: str,
) -> None:
    def fail(descriptor: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected, match=match):
        open_store(str(tmp_path)).put("shard.parquet", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_refuses_writes_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot write /sys/batchinfer-test/x"):
        open_store("/sys/batchinfer-test").put("x", b"")


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file/x"):
        open_store(str(tmp_path)).put("file/x", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*folder"):
        open_store(str(tmp_path)).put("folder", b"")


def test_every_new_folder_and_its_parent_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    open_store(str(tmp_path)).put("a/b/file", b"x")
    folders = [path for path in synced if not path.endswith(".tmp")]
    assert folders == [".", "a", "a/b"]
    assert synced[2].startswith("a/b/.file.") and synced[3] == "a/b"


def test_create_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> NoReturn:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(str(tmp_path))
    assert store.create("x", b"1") and not store.create("x", b"2") and store.create("x", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_links_are_followed_once_and_dangling_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").touch()
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    assert keys_of(open_store(str(tmp_path))) == ["data/x", "linked/x"]
    (tmp_path / "lost.parquet").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"lost\.parquet is a link to nothing"):
        keys_of(open_store(str(tmp_path)))


def test_a_local_url_is_absolute_and_keeps_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    monkeypatch.chdir(tmp_path)
    assert open_store("link/").url == f"{tmp_path}/link"
    assert open_store("link/../x").url == f"{tmp_path}/real/x"
    assert open_store("/").url_of("etc/hosts") == "/etc/hosts"


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://bucket/a/b.parquet", "s3://bucket/a", "b.parquet"),
        ("s3://bucket/b.parquet", "s3://bucket", "b.parquet"),
        ("s3://bucket", "s3://bucket", ""),
        ("/abs/b.parquet", "/abs", "b.parquet"),
        ("/b", "/", "b"),
        ("rel/b", "rel", "b"),
        ("b", ".", "b"),
    ],
)
def test_a_url_splits_into_folder_and_name_and_joins_again(
    url: str, folder: str, name: str
) -> None:
    assert split_url(url) == (folder, name)
    assert join_url(folder, name) == url
    assert is_s3(url) == url.startswith("s3")


@pytest.mark.parametrize(
    "url", ["", "gs://bucket/x", "s3://", "s3:///key", "s3://key:hush@bucket/x"]
)
def test_a_url_that_no_store_serves_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_store(url)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("key", ["x/../o", "x//o", "/o", "./o", "..", "o/."])
def test_a_part_of_an_s3_path_that_is_not_a_name_is_refused(key: str) -> None:
    """The store would take it literally: a folder `..` that other programs cannot name."""
    with pytest.raises(ConfigError, match="literally"):
        open_store(f"s3://bucket/{key}")
    check_url("s3://bucket/..x/.o/")


@pytest.mark.parametrize("above", ["", "below"])
def test_a_link_to_nothing_is_said_to_be_in_the_way_of_a_folder(tmp_path: Path, above: str) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    assert "link is a link to nothing (nowhere)" in str(why_no_folder(link / above))
    (tmp_path / "nowhere").mkdir()
    assert why_no_folder(link / above) is None
    assert why_no_folder(tmp_path / "new" / "folder") is None


@pytest.mark.parametrize("below", ["", "one", "one/two"])
def test_a_file_is_said_to_be_in_the_way_of_a_folder(tmp_path: Path, below: str) -> None:
    file = tmp_path / "afile"
    file.touch()
    assert f"{file} is a file where a folder is needed" in str(why_no_folder(file / below))
    with pytest.raises(ConfigError, match="/afile is a file where a folder is needed"):
        open_store(str(file / below)).put("key", b"content")
