"""A run on an S3 store that loses replies, throttles, stalls and goes away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy, Rule, fault_proxy
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

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.url) as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, proxy: FaultProxy) -> Place:
    """A bucket with 120 rows in two shards, reached through the proxy by the runs alone."""
    proxy.reset()
    place = Place(f"s3://{server.create_bucket()}", server.environment())
    place.write_parquet("in/a.parquet", rows(100))
    place.write_parquet("in/b.parquet", rows(20, start=100))
    return place


def through(proxy: FaultProxy, bucket: Place) -> Place:
    return Place(bucket.root, {**bucket.environ, "AWS_ENDPOINT_URL": proxy.url})


def must_be_whole(bucket: Place) -> None:
    have = results(bucket)
    assert have["row"].to_list() == [*range(100), *range(20)]
    assert not [n for n in bucket.names("out") if "/parts/" in n]
    assert "_SUCCESS" in bucket.names("out")


LOST: dict[str, list[Rule]] = {
    "part": [Rule("lose_reply", method="PUT", path=r"/parts/", times=2)],
    "finished file": [Rule("lose_reply", method="PUT", path=r"\.parquet$", times=2)],
    "run number": [Rule("lose_reply", method="PUT", path=r"/runs/")],
    "lease": [Rule("lose_reply", method="PUT", path=r"/leases/all-")],
    "job record": [Rule("lose_reply", method="PUT", path=r"job\.json")],
    "_SUCCESS": [Rule("lose_reply", method="PUT", path=r"_SUCCESS")],
    "delete of folded parts": [Rule("lose_reply", method="POST", query="delete")],
    "throttled": [
        Rule("status", method="PUT", path=r"/parts/", status=503, code="SlowDown", times=3),
        Rule("status", method="GET", path=r"/in/", status=500, code="InternalError", times=2),
    ],
    "conflict": [
        Rule("status", method="PUT", path="/runs/", status=409, code="ConditionalRequestConflict")
    ],
    "cut off while reading": [Rule("truncate", method="GET", path=r"/in/", times=2)],
}


@pytest.mark.parametrize("what", LOST)
def test_a_lost_or_refused_reply_changes_nothing(
    what: str, proxy: FaultProxy, bucket: Place, tmp_path: Path
) -> None:
    proxy.reset(*LOST[what])
    path = write_job(tmp_path, job(bucket))
    ended = run(path, place=through(proxy, bucket), fake={"step_s": 0.01})
    assert ended.code == 0, ended.stderr
    assert all(rule.times == 0 for rule in proxy.rules), "the fault did not happen"
    assert ended.result["rows_computed"] == 120
    must_be_whole(bucket)


def test_killed_after_a_part_whose_reply_was_lost_it_is_there_once(
    proxy: FaultProxy, bucket: Place, tmp_path: Path
) -> None:
    proxy.reset(Rule("lose_reply", method="PUT", path=r"/parts/"))
    path = write_job(tmp_path, job(bucket))
    crash = {"op": "publish", "key": "parts/", "when": "after"}
    killed = run(path, place=through(proxy, bucket), crash=crash, fake={"step_s": 0.01})
    assert killed.code == -9
    ended = run(path, place=bucket)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] < 120
    must_be_whole(bucket)


def test_a_store_that_goes_away_ends_with_75_and_nothing_durable_is_lost(
    proxy: FaultProxy, bucket: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(bucket))
    proxy.reset(Rule("status", method="PUT", path=r"/parts/", skip=3, times=None))
    ended = run(
        path, place=through(proxy, bucket), fake={"step_s": 0.02}, environ={"FAKE_RETRY_S": "3"}
    )
    assert ended.code == 75, ended.stderr
    assert "/parts/" in ended.stderr
    durable = [n for n in bucket.names("out") if n.endswith(".part")]
    assert len(durable) == 3
    again = run(path, place=bucket)
    assert again.code == 0
    assert again.result["rows_computed"] < 120
    must_be_whole(bucket)


def test_credentials_that_expire_during_a_run_are_reported_in_full_once(
    proxy: FaultProxy, bucket: Place, tmp_path: Path
) -> None:
    """Though the part, the status and the lease are all refused."""
    path = write_job(tmp_path, job(bucket))
    expired = {"method": "PUT", "status": 400, "code": "ExpiredToken", "times": None}
    proxy.reset(
        Rule("status", path=r"/parts/", skip=3, **expired),
        Rule("status", path=r"/status/|/leases/", skip=4, **expired),
    )
    ended = run(path, place=through(proxy, bucket), fake={"step_s": 0.02})
    assert ended.code == 75, ended.stderr
    assert ended.stderr.count("ExpiredToken") == 1, ended.stderr
    assert ended.stderr.count("now refuses the credentials") <= 1
    assert "since the run began" in ended.result["message"]
    assert run(path, place=bucket).code == 0
    must_be_whole(bucket)


def test_slow_storage_does_not_stop_a_sigterm_from_ending_in_time(
    proxy: FaultProxy, bucket: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(bucket))
    proxy.reset(Rule("delay", method="PUT", path=r"/parts/", times=None, delay_s=1.0))
    process = start(path, place=through(proxy, bucket), fake={"step_s": 0.1, "max_num_seqs": 8})
    wait_until(bucket.parts, what="a part")
    sent = time.monotonic()
    kill(process, 15)
    stopped = wait(process, 20)
    assert stopped.code == 143
    assert time.monotonic() - sent < 20
    rest = run(path, place=bucket)
    assert stopped.result["rows_computed"] + rest.result["rows_computed"] == 120
    must_be_whole(bucket)


def test_a_stuck_upload_is_given_up_by_the_watchdog(
    proxy: FaultProxy, bucket: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(bucket))
    rule = Rule("delay", method="PUT", path=r"/parts/", skip=1, times=None, delay_s=60.0)
    proxy.reset(rule)
    slow = {"step_s": 0.1, "max_num_seqs": 8}
    environ = {"FAKE_GRACE_S": "3"}
    process = start(path, place=through(proxy, bucket), fake=slow, environ=environ)
    wait_until(lambda: proxy.num_seen("PUT", r"/parts/") > 1, what="an upload that is stuck")
    sent = time.monotonic()
    kill(process, 15)
    stopped = wait(process, 25)
    proxy.reset()
    assert stopped.code == 143
    assert 2 < time.monotonic() - sent < 18
    assert run(path, place=bucket).code == 0
    must_be_whole(bucket)


def test_credentials_never_reach_the_output(bucket: Place, tmp_path: Path) -> None:
    secret = "a-secret-that-must-not-be-written"
    place = Place(bucket.root, {**bucket.environ, "AWS_SECRET_ACCESS_KEY": secret})
    path = write_job(tmp_path, job(bucket))
    ended = run(path, place=place)
    assert ended.code == 0
    written = [bucket.fs.cat(bucket.url("out", n)) for n in bucket.names("out")]
    assert not any(secret.encode() in content for content in written)
    assert secret not in ended.stdout + ended.stderr
