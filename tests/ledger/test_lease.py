"""One live run on an output: who gets a lease, who is refused, who is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest

from batchinfer.errors import ConfigError, LeaseHeld, LeaseLost, TransientError
from batchinfer.ledger import Holder, Lease, acquire_lease
from batchinfer.ledger import lease as lease_module
from batchinfer.ledger.holder import process_start
from batchinfer.ledger.layout import LEASES_PREFIX
from batchinfer.ledger.lease_local import LocalProof
from batchinfer.storage import Store, open_store
from batchinfer.storage.flock import FileLock
from tests.support.jobs import Place, job, results, rows, run, start, wait, write_job
from tests.support.s3_server import S3Server

SINCE = "2026-01-02T03:04:05Z"
WATCH_S = 10.0

LOCAL_HOLDER = """
import sys
from batchinfer.ledger import Holder, acquire_lease
from batchinfer.storage import open_store

lease = acquire_lease(open_store(sys.argv[1]), sys.argv[2], Holder.current("since then"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{server.create_bucket()}/out", retry_s=5)
    yield store
    store.close()


def here() -> Holder:
    return Holder.current(SINCE)


def elsewhere(name: str = "far-away") -> Holder:
    return replace(here(), host=name, boot_id=f"boot of {name}")


def dead_here() -> Holder:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return replace(here(), pid=ended.pid, process_start="1")


def no_sleep(seconds: float) -> NoReturn:
    raise AssertionError("nobody is to be watched here")


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.slept_s = 0.0
        self._then = then

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self._then()


def acquire(
    store: Store, name: str, holder: Holder, sleep: Callable[[float], None] = no_sleep
) -> Lease:
    return acquire_lease(store, name, holder, watch_s=WATCH_S, sleep=sleep)


s3 = pytest.mark.s3


@s3
def test_of_many_contenders_one_gets_the_lease(bucket: Store) -> None:
    start = threading.Barrier(6)

    def contend(number: int) -> Lease | None:
        start.wait()
        try:
            return acquire(bucket, "all", here())
        except LeaseHeld as error:
            assert "another run is working on s3://" in str(error)
            return None

    with ThreadPoolExecutor(6) as pool:
        leases = [*pool.map(contend, range(6))]
    assert sum(lease is not None for lease in leases) == 1


@s3
def test_of_many_that_take_over_a_dead_one_one_gets_the_lease(bucket: Store) -> None:
    acquire(bucket, "all", dead_here())
    start = threading.Barrier(6)

    def contend(number: int) -> bool:
        start.wait()
        try:
            acquire(bucket, "all", here())
        except LeaseHeld:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(contend, range(6))) == 1


@s3
def test_a_released_lease_is_taken_immediately(bucket: Store) -> None:
    for number in range(6):
        lease = acquire(bucket, "all", elsewhere(f"host-{number}"))
        lease.beat()
        lease.release()
        lease.release()
        lease.beat()  # after a release: nothing
    assert len([*bucket.list(LEASES_PREFIX)]) == 1, "older ones are removed"


@s3
def test_a_holder_of_this_machine_that_lives_is_named(bucket: Store) -> None:
    holder = here()
    acquire(bucket, "all", holder)
    with pytest.raises(LeaseHeld, match=f"host {holder.host}, pid {holder.pid}, since {SINCE}"):
        acquire(bucket, "all", here())


@s3
def test_a_holder_of_this_machine_whose_process_is_gone_is_taken_over_immediately(
    bucket: Store,
) -> None:
    acquire(bucket, "all", dead_here())
    acquire(bucket, "all", replace(here(), process_start="1"))  # our pid, used by another process
    acquire(bucket, "all", here())


@s3
def test_a_holder_elsewhere_that_shows_no_life_is_taken_over_after_the_watch(
    bucket: Store,
) -> None:
    old = acquire(bucket, "all", elsewhere())
    old.beat()
    clock = Clock()
    new = acquire(bucket, "all", here(), clock.sleep)
    assert clock.slept_s == WATCH_S
    with pytest.raises(LeaseHeld, match=f"pid {here().pid}"):
        old.beat()
    new.beat()
    old.release()  # changes nothing for the new one
    new.beat()
    with pytest.raises(LeaseHeld):
        acquire(bucket, "all", here())


@s3
@pytest.mark.parametrize("name", ["all", "0-of-2"])
def test_a_holder_elsewhere_that_shows_life_keeps_its_lease(bucket: Store, name: str) -> None:
    other = acquire(bucket, name, elsewhere())
    clock = Clock(lambda: other.beat() if clock.slept_s >= WATCH_S else None)
    with pytest.raises(LeaseHeld, match="host far-away"):
        acquire(bucket, "all", here(), clock.sleep)
    other.beat()


@s3
def test_a_holder_elsewhere_that_releases_is_not_watched_on(bucket: Store) -> None:
    other = acquire(bucket, "all", elsewhere())
    clock = Clock(other.release)
    acquire(bucket, "all", here(), clock.sleep)
    assert clock.slept_s < WATCH_S


@s3
def test_whoever_watches_others_with_its_own_lease_out_shows_life_itself(bucket: Store) -> None:
    """Else two that exclude each other and start at once take each other for dead."""
    acquire(bucket, "1-of-2", elsewhere("dead"))
    key = f"{LEASES_PREFIX}all-000001.json"
    counters: list[int] = []
    clock = Clock(lambda: counters.append(json.loads(bucket.read(key))["counter"]))
    acquire(bucket, "all", elsewhere("starting"), clock.sleep)
    assert clock.slept_s == WATCH_S
    assert counters == sorted(set(counters))
    assert len(counters) > 2


@s3
@pytest.mark.parametrize("how", ["check", "beat"])
@pytest.mark.parametrize("what", ["deleted", "replaced", "damaged", "taken over"])
def test_a_lease_whose_object_is_gone_is_lost_and_is_not_written_again(
    bucket: Store, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    monkeypatch.setattr(lease_module, "_CHECK_S", 0.0)
    lease = acquire(bucket, "all", here())
    key, newer = (f"{LEASES_PREFIX}all-{number:06d}.json" for number in (1, 2))
    bucket.delete([key])
    if what == "replaced":  # another output is there now
        acquire(bucket, "all", elsewhere())
    elif what == "damaged":
        bucket.put(key, b"\xff")
    elif what == "taken over":
        bucket.put(newer, json.dumps(asdict(elsewhere())).encode())
    left = {info.key: info.version for info in bucket.list()}
    error, words = (LeaseHeld, "far-away") if what == "taken over" else (LeaseLost, "was deleted")
    with pytest.raises(error, match=words):
        getattr(lease, how)()
    lease.release()
    assert {info.key: info.version for info in bucket.list()} == left


@s3
def test_a_damaged_lease_is_taken_over_after_the_watch(bucket: Store) -> None:
    for number, content in ((9, b""), (19, b"[]"), (29, b'{"host": 1}')):
        bucket.put(f"{LEASES_PREFIX}all-{number:06d}.json", content)
        clock = Clock(lambda: None)
        acquire(bucket, "all", here(), clock.sleep).release()
        assert clock.slept_s == WATCH_S


@s3
def test_the_whole_and_its_slices_exclude_each_other_and_slices_do_not(bucket: Store) -> None:
    slices = [acquire(bucket, f"{i}-of-2", here()) for i in range(2)]
    with pytest.raises(LeaseHeld):
        acquire(bucket, "all", here())
    with pytest.raises(LeaseHeld):
        acquire(bucket, "0-of-2", here())
    for lease in slices:
        lease.beat()
        lease.release()
    whole = acquire(bucket, "all", here())  # and the refused one left nothing in the way
    with pytest.raises(LeaseHeld):
        acquire(bucket, "1-of-2", here())
    whole.beat()
    whole.release()
    acquire(bucket, "1-of-2", here())


# Local


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("held", "wanted", "is_refused"),
    [
        ("all", "all", True),
        ("all", "0-of-2", True),
        ("0-of-2", "all", True),
        ("0-of-2", "0-of-2", True),
        ("0-of-2", "1-of-2", False),
    ],
)
def test_a_local_lease_is_held_across_processes_until_its_process_ends(
    root: Store, held: str, wanted: str, is_refused: bool
) -> None:
    command = [sys.executable, "-c", LOCAL_HOLDER, root.url, held]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        if is_refused:
            with pytest.raises(LeaseHeld, match=f"pid {process.pid}, since since then"):
                acquire(root, wanted, here())
        else:
            acquire(root, wanted, here()).release()
        process.kill()
    lease = acquire(root, wanted, here())
    lease.beat()
    lease.release()
    lease.release()


def test_a_local_lease_refuses_a_second_one_of_this_process(root: Store) -> None:
    lease = acquire(root, "all", here())
    with pytest.raises(LeaseHeld, match=f"pid {here().pid}"):
        acquire(root, "all", here())
    lease.release()
    acquire(root, "all", here()).release()


def test_a_process_is_identified_by_its_start_time_too() -> None:
    assert here().is_dead_here() is False
    assert replace(here(), process_start="1").is_dead_here() is True
    assert dead_here().is_dead_here() is True
    assert elsewhere().is_dead_here() is None
    assert process_start(2**22 + 1) is None
    assert Holder(**asdict(here())).token


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_needs_the_promise_of_a_single_writer(
    root: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_locks(monkeypatch, number)
    with pytest.raises(ConfigError, match=r"has no file locks .*output\.path.*single_writer"):
        acquire(root, "all", here())
    for name in ("all", "1-of-2"):
        lease = acquire_lease(root, name, here(), single_writer=True)
        lease.beat()
        lease.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.ESTALE])
def test_a_lock_service_that_does_not_answer_is_a_reason_to_try_again(
    root: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_locks(monkeypatch, number)
    with pytest.raises(TransientError, match="Start again"):
        acquire(root, "all", here())


def test_a_slice_that_takes_back_its_traces_leaves_those_of_another(root: Store) -> None:
    meta = Path(root.url)
    first, second = (acquire(root, f"{i}-of-2", here()) for i in (1, 2))
    first.undo()
    second.check()
    with pytest.raises(LeaseHeld):
        acquire(root, "all", here())
    second.undo()
    assert [f.name for f in meta.rglob("*") if f.is_file()] == ["all.lock"]
    acquire(root, "all", here()).undo()
    assert meta.exists(), "what was there before stays"


def test_the_holder_of_a_lock_is_waited_for_until_it_is_identified(root: Store) -> None:
    lock = FileLock(Path(root.url) / LEASES_PREFIX / "all.lock")
    of_the_run_before = json.dumps(asdict(dead_here())).encode()
    assert lock.acquire()
    lock.write(of_the_run_before)
    timer = threading.Timer(0.2, lambda: lock.write(json.dumps(asdict(here())).encode()))
    timer.start()
    with pytest.raises(LeaseHeld, match=f"pid {here().pid}, since {SINCE}"):
        acquire(root, "all", here())
    timer.join()
    lock.write(of_the_run_before)
    threading.Timer(0.2, lock.release).start()
    acquire(root, "all", here()).release()  # it ended meanwhile


def test_a_local_lease_whose_file_is_gone_is_lost(root: Store) -> None:
    lease = acquire(root, "all", here())
    lease.check()
    shutil.rmtree(root.url)
    for look in (lease.check, lease.beat):
        with pytest.raises(LeaseLost, match="deleted, moved or replaced"):
            look()
    acquire(root, "all", here())
    with pytest.raises(LeaseLost):  # the file there is another's
        lease.check()
    lease.release()
    lease.check()


@pytest.mark.parametrize("name", ["all", "1-of-2"])
def test_another_machine_knows_a_shared_folder_by_what_its_lock_says(
    root: Store, name: str
) -> None:
    """Its number for the file system is another; and a folder of that name may be its own."""
    lease = acquire(root, name, elsewhere())
    proof = lease.proof()
    assert isinstance(proof, LocalProof)
    there = replace(proof, files=tuple((path, (0, 0)) for path, _ in proof.files))
    seen = there.open(root)
    seen.check()
    shutil.rmtree(root.url)
    with pytest.raises(LeaseLost):
        seen.check()
    with pytest.raises(ConfigError, match="is not what is there on"):
        there.open(root)
    acquire(root, name, elsewhere("of-its-own"))
    with pytest.raises(ConfigError, match=f"the output {re.escape(root.url)} of the machine that"):
        there.open(root)
    lost = replace(there, holder=json.dumps(asdict(here())).encode()).open(root)
    with pytest.raises(LeaseLost):  # on the machine of its holder it was deleted
        lost.check()


def test_simultaneous_starts_end_well_or_name_the_one_at_work(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/a.parquet", rows(30))
    path = write_job(tmp_path, job(folder))
    for _ in range(4):
        ended = [wait(process) for process in [start(path), start(path), start(path)]]
        for one in ended:
            assert one.code == 0 or (one.code == 75 and "pid" in one.stderr), one.stderr
        assert results(folder).height == 30
        shutil.rmtree(folder.url("out"))


def test_a_sweep_leaves_the_files_of_those_that_hold_no_lease(
    folder: Place, tmp_path: Path
) -> None:
    """`doctor --store` tries out a store while a run begins there."""
    folder.write_parquet("in/a.parquet", rows(30))
    probe = Path(folder.url("out", "_batchinfer", "leases", ".doctor-1.0a1b2c3d.tmp"))
    probe.parent.mkdir(parents=True)
    probe.touch()
    ended = run(write_job(tmp_path, job(folder)))
    assert ended.code == 0, ended.stderr
    assert probe.exists()
