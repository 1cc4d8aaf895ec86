"""What the outside does to a run: nothing durable is lost, and the next start finishes the job.

Exit code 75 where the same start may work later, 2 where somebody has to change something first.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchinfer.telemetry import Clock
from tests.support.endings import changed, must_be_untouched, must_fail, read_bytes
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.jobs import (
    Place,
    job,
    kill,
    results,
    rows,
    run,
    start,
    wait,
    wait_until,
    write_job,
)
from tests.support.s3_server import S3Server

SLOW = {"step_s": 0.02, "max_num_seqs": 8}
SHORT_RETRIES = {"FAKE_RETRY_S": "1"}


def must_finish(path: Path, place: Place, num_rows: int, num_durable: int) -> None:
    """The next start computes what was not durable, and nothing else."""
    ended = run(path, place=place)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] == num_rows - num_durable
    found = results(place)
    assert found.height == num_rows and found["id"].n_unique() == num_rows


def test_shards_that_change_or_vanish_during_a_run_cost_no_other_shard_a_row(
    place: Place, tmp_path: Path
) -> None:
    for index in range(3):
        place.write_parquet(f"in/s{index}.parquet", rows(40, start=40 * index))
    before = {name: read_bytes(place, f"in/{name}") for name in place.names("in")}
    path = write_job(tmp_path, job(place))
    process = start(path, place=place, fake=SLOW | {"step_s": 0.08})
    wait_until(place.parts, what="a first part")
    place.write_parquet("in/s1.parquet", rows(41, start=7))
    place.fs.rm(place.url("in", "s2.parquet"))
    ended = wait(process)
    must_fail(
        ended,
        2,
        f"{place.url('in/s1.parquet')} changed while it was computed",
        f"{place.url('in/s2.parquet')} vanished while it was computed",
        "Bring the old file back",
    )
    assert [n for n in place.names("out") if n.endswith(".parquet")] == ["s0.parquet"]
    assert "_SUCCESS" not in place.names("out")
    for name in ("s1.parquet", "s2.parquet"):
        with place.fs.open(place.url("in", name), "wb") as sink:
            sink.write(before[name])
    again = run(path, place=place)
    assert again.code == 0, again.stderr
    assert again.result["rows_computed"] < 80, "durable rows of the shards were computed again"
    assert results(place)["id"].to_list() == [f"row-{n}" for n in range(120)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 1 MiB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Append until nothing fits any more."""
    with path.open("ab", buffering=0) as file:
        for step_bytes in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(step_bytes))


def test_a_full_disk_keeps_what_is_durable_and_the_next_start_finishes(
    small_disk: Path, tmp_path: Path
) -> None:
    place = Place(str(small_disk))
    elsewhere = Place(str(tmp_path / "elsewhere"))
    elsewhere.write_parquet("in/s0.parquet", rows(300))
    settings = changed(job(place), input={"path": elsewhere.url("in", "*.parquet")})
    path = write_job(tmp_path, settings)
    ballast = small_disk / "ballast"
    process = start(path, fake=SLOW)
    wait_until(place.parts, what="a first part")
    fill(ballast)
    fill(small_disk / "out/_batchinfer/logs/0001.log")
    full = wait(process)
    must_fail(full, 75, "disk full while writing", place.url("out"), "free space and start again")
    num_durable = full.result["rows"]
    assert (
        num_durable == sum(place.read_parquet(f"out/{part}").height for part in place.parts()) > 0
    )
    assert not [n for n in place.names("out") if n.endswith((".tmp", ".parquet"))]
    fill(ballast)
    must_fail(run(path), 75, "disk full")
    ballast.unlink()
    must_finish(path, place, 300, num_durable)


@pytest.fixture
def bucket(server: S3Server) -> Place:
    place = Place(f"s3://{server.create_bucket()}", server.environment())
    place.write_parquet("in/s0.parquet", rows(100))
    return place


@pytest.mark.s3
def test_a_run_resumes_after_the_store_was_down(
    server: S3Server, bucket: Place, tmp_path: Path
) -> None:
    """A store that goes down keeps what is durable and the next start finishes."""
    path = write_job(tmp_path, job(bucket))
    with fault_proxy(server.url) as proxy:
        proxied = Place(bucket.root, server.environment(proxy.url))
        # All writes of parts fail from the third on, and with them all that comes after.
        proxy.reset(Rule("refuse", "PUT|POST", r"/parts/|\.parquet", skip=2, times=None))
        ended = run(path, place=proxied, fake=SLOW, environ=SHORT_RETRIES)
    must_fail(ended, 75, "write s3://", "failed", "Nothing durable is lost", "start again")
    num_durable = sum(bucket.read_parquet(f"out/{part}").height for part in bucket.parts())
    assert len(bucket.parts()) == 2 and num_durable == ended.result["rows"]
    must_finish(path, bucket, 100, num_durable)


@pytest.mark.s3
def test_a_store_that_cannot_be_reached_is_given_up_within_the_retry_cap(
    bucket: Place, tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        down = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        path = write_job(tmp_path, job(bucket))
        begun = time.monotonic()
        ended = run(path, place=bucket, environ=down | SHORT_RETRIES)
    must_fail(ended, 75, bucket.url("out"), "times in", "start again when the store answers")
    assert time.monotonic() - begun < 25
    must_be_untouched(bucket)


@pytest.mark.s3
def test_wrong_credentials_and_missing_buckets_are_not_tried_again(
    server: S3Server, bucket: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(bucket))
    with fault_proxy(server.url) as proxy:
        proxy.reset(Rule("status", status=403, code="InvalidAccessKeyId", times=None))
        refused = run(path, place=Place(bucket.root, server.environment(proxy.url)))
        assert proxy.num_seen(".*") == 1
    must_fail(
        refused, 2, bucket.url("out"), "credentials refused", "InvalidAccessKeyId", "AWS_PROFILE"
    )
    missing = "s3://no-such-bucket-here"
    for sections in ({"input": {"path": f"{missing}/x.parquet"}}, {"output": {"path": missing}}):
        path = write_job(tmp_path, changed(job(bucket), **sections))
        must_fail(run(path, place=bucket), 2, missing, "no such bucket")
    must_be_untouched(bucket)


def test_a_second_run_names_the_first_until_it_stops(place: Place, tmp_path: Path) -> None:
    """A second run names the first and a stop while loading frees the output at once."""
    place.write_parquet("in/s0.parquet", rows(20))
    path = write_job(tmp_path, job(place))
    loading = start(path, place=place, fake={"build_s": 30})
    try:
        wait_until(lambda: any("/runs/" in name for name in place.names("out")), what="a run")
        second = run(path, place=place)
        must_fail(
            second, 75, "another run is working on", f"pid {loading.pid}", socket.gethostname()
        )
        skipped = run(path, "--if-running", "skip", place=place)
        assert (skipped.code, skipped.result["status"]) == (0, "skipped"), skipped.stderr
        assert f"pid {loading.pid}" in skipped.result["message"]
        silent = run(path, "--if-running", "skip", "--quiet", "--shard", "1/2", place=place)
        assert (silent.code, silent.stdout, silent.stderr) == (0, "", "")
        kill(loading, signal.SIGTERM)
        stopped_s = time.monotonic()
        stopped = wait(loading, 20)
    finally:
        kill(loading)
    assert time.monotonic() - stopped_s < 5
    assert stopped.code == 143
    assert "received SIGTERM before the first row was admitted" in stopped.stderr
    assert stopped.result["status"] == "stopped"
    must_finish(path, place, 20, 0)


def test_an_engine_that_dies_says_what_is_safe_and_what_to_do(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/s0.parquet", rows(100))
    path = write_job(tmp_path, job(folder))
    died = run(path, fake=SLOW | {"die_at_step": 40})
    must_fail(died, 75, "engine died", "Finished rows are durable: start again")
    assert died.result["rows"] > 0
    must_finish(path, folder, 100, died.result["rows"])


def test_a_clock_that_is_set_back_does_not_turn_finished_at_back() -> None:
    now = {"wall": 1_700_000_000_000_000_000, "monotonic": 5}
    clock = Clock(lambda: now["wall"], lambda: now["monotonic"])
    before = clock.wall_us()
    now["wall"] -= 3_600_000_000_000
    now["monotonic"] += 2_000_000
    assert clock.wall_us() - before == 2000
    assert before == 1_700_000_000_000_000
