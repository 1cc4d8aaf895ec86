"""A run on several devices: the same rows as on one, whichever of its processes is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support.jobs import (
    Place,
    job,
    results,
    rows,
    run,
    stable,
    start,
    wait,
    wait_until,
    write_job,
)
from tests.support.processes import await_children, await_end, kill_one

#: One large shard, many windows; small ones of one window; one without rows.
NUM_ROWS = (500, 50, 0, 1, 30)
SLOW = {"step_s": 0.012, "max_num_seqs": 8}
STEPPING = {"step_s": 0.05, "max_num_seqs": 32}  # most of the time asleep, however busy the machine


def write_input(place: Place, num_rows: Sequence[int] = NUM_ROWS) -> None:
    first = 0
    for index, number in enumerate(num_rows):
        place.write_parquet(f"in/s{index}.parquet", rows(number, start=first))
        first += number


def job_on(place: Place, devices: Any, **sections: Any) -> dict[str, Any]:
    return job(place, engine={"name": "fake", "devices": devices}, **sections)


def await_engines(place: Place, number: int) -> None:
    """Until so many replicas have theirs: each has rows then."""
    log = Path(place.url("out", "_batchinfer", "logs", "0001.log"))
    wait_until(
        lambda: log.exists() and log.read_text().count(" engine_ready ") == number,
        what=f"{number} engines",
    )


def must_be_whole(place: Place, reference: pl.DataFrame) -> None:
    have = results(place)
    assert have.group_by("shard", "row", "sample").len()["len"].max() == 1
    assert stable(have).equals(reference)
    names = place.names("out")
    assert "_SUCCESS" in names
    assert not [n for n in names if "/parts/" in n or n.endswith(".tmp")]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What one device gives, sampled with seeds."""
    folder = tmp_path_factory.mktemp("reference")
    place = Place(str(folder / "data"))
    write_input(place)
    ended = run(write_job(folder, job_on(place, 1)))
    assert ended.code == 0, ended.stderr
    assert "replica" not in ended.stderr, "one device needs no other process"
    return stable(results(place))


@pytest.fixture
def two(place: Place, tmp_path: Path) -> Path:
    """The input, and a job over it on two devices."""
    write_input(place)
    return write_job(tmp_path, job_on(place, 2))


def test_two_replicas_give_the_rows_of_one_device(
    place: Place, two: Path, reference: pl.DataFrame
) -> None:
    ended = run(two, place=place, fake={"step_s": 0.005})
    assert ended.code == 0, ended.stderr
    must_be_whole(place, reference)
    assert len(ended.stdout.splitlines()) == 1
    assert ended.result["status"] == "complete"
    assert ended.result["rows_computed"] == sum(NUM_ROWS)
    computed = [line for line in ended.stderr.splitlines() if " computed rows=" in line]
    assert len(computed) == 2
    assert not [line for line in computed if "rows=0" in line], "each had its share"
    labels = {line.partition(" replica=")[2] for line in computed}
    assert len(labels) == 2 and all(labels), "and says who it is"
    verdict = ended.result["verdict"]
    assert verdict["device"] == "2 x none"
    assert verdict["tokens_per_s"] == ended.result["completion_tokens_per_s"]
    assert 0 <= verdict["host"] < 1


def test_a_replica_that_is_killed_is_replaced_and_the_other_goes_on(
    place: Place, two: Path, reference: pl.DataFrame
) -> None:
    process = start(two, place=place, fake=SLOW)
    first, second = await_children(process.pid, 2)
    while not place.parts():
        time.sleep(0.1)
    kill_one(first, signal.SIGKILL)
    await_end(first, timeout_s=10)
    replaced = await_children(process.pid, 2)
    assert second in replaced and first not in replaced
    ended = wait(process)
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("replica started") == 3
    must_be_whole(place, reference)


def test_a_frozen_replica_is_noticed_and_its_work_goes_to_others(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    process = start(path, fake=STEPPING, environ={"FAKE_SILENT_S": "3"})
    first, _ = await_children(process.pid, 2)
    await_engines(folder, 2)
    kill_one(first, signal.SIGSTOP)
    await_end(first, timeout_s=60)
    ended = wait(process)
    assert ended.code == 0, ended.stderr
    assert "nothing was heard of it for 3 s" in ended.stderr
    must_be_whole(folder, reference)


def test_a_killed_replicas_durable_rows_are_not_computed_again(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/s.parquet", rows(600))
    path = write_job(tmp_path, job_on(folder, 2, packing={"window_rows": 600}))
    logs = [tmp_path / f"asked-{n}" for n in range(2)]
    own = {str(n): {"log_file": str(log)} for n, log in enumerate(logs)}
    process = start(path, fake=SLOW, environ={"FAKE_REPLICAS": json.dumps(own)})
    first, _ = await_children(process.pid, 2)
    while sum(map(is_of_first, folder.parts())) < 4:
        time.sleep(0.05)
    os.kill(first, signal.SIGSTOP)
    time.sleep(0.3)
    asked = logs[0].read_text().splitlines()
    durable = [folder.read_parquet(f"out/{p}") for p in folder.parts() if is_of_first(p)]
    asked_of_other = len(logs[1].read_text().splitlines())
    os.kill(first, signal.SIGKILL)
    assert wait(process).code == 0
    later = logs[0].read_text().splitlines()[len(asked) :]
    later += logs[1].read_text().splitlines()[asked_of_other:]
    num_durable = sum(frame.height for frame in durable)
    assert num_durable >= 20
    assert len(set(asked) & set(later)) == len(asked) - num_durable
    assert sorted(results(folder)["row"]) == list(range(600))


def is_of_first(part: str) -> bool:
    """Whether the process that was started first has written it, by its number."""
    return int(part.removesuffix(".part").rpartition("-")[2]) // 1_000_000_000 == 1


@pytest.mark.parametrize("devices", [1, 3])
def test_after_the_parent_is_killed_any_number_of_devices_goes_on(
    devices: int, place: Place, two: Path, tmp_path: Path, reference: pl.DataFrame
) -> None:
    process = start(two, place=place, fake=SLOW)
    replicas = await_children(process.pid, 2)
    while not place.parts():
        time.sleep(0.1)
    os.kill(replicas[0], signal.SIGSTOP)  # as in a long call: it reads nothing, and ends as well
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    await_end(*replicas, timeout_s=15)
    before = sum(place.read_parquet(f"out/{part}").height for part in place.parts())
    ended = run(write_job(tmp_path, job_on(place, devices), "again.yaml"), place=place)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] <= sum(NUM_ROWS) - before, "nothing durable twice"
    must_be_whole(place, reference)


def test_sigterm_makes_durable_what_every_replica_has_finished(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    process = start(path, fake=SLOW)
    replicas = await_children(process.pid, 2)
    while not folder.parts():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    begun_s = time.monotonic()
    ended = wait(process)
    assert ended.code == 143, ended.stderr
    assert time.monotonic() - begun_s < 20
    await_end(*replicas, timeout_s=1)
    assert ended.result["rows"] == ended.result["rows_computed"] > 0
    assert run(path).code == 0
    must_be_whole(folder, reference)


def test_rows_that_kill_replicas_are_named_and_the_others_are_computed(
    folder: Place, tmp_path: Path
) -> None:
    write_input(folder)
    poison = pl.DataFrame({"id": ["poison"], "text": ["word " * 60]})
    folder.write_parquet("in/s5.parquet", pl.concat([rows(40, start=900), poison]))
    path = write_job(tmp_path, job_on(folder, 2))
    ended = run(path, fake={"step_s": 0.01, "kill_at_tokens": 55})
    assert ended.code == 1, ended.stderr
    named = re.findall(r"rows (\d+) to (\d+) of (s\d.parquet)", ended.result["message"])
    assert {shard for _, _, shard in named} == {"s5.parquet"}, ended.result["message"]
    assert any(int(first) <= 40 <= int(last) for first, last, _ in named)
    assert {f"s{n}.parquet" for n in range(5)} <= set(folder.names("out"))
    assert "_SUCCESS" not in folder.names("out")
    assert run(path).code == 0, "where nothing kills"
    assert len(results(folder)) == sum(NUM_ROWS) + 41


def test_a_device_that_never_starts_leaves_the_work_to_the_other(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    environ = {"FAKE_REPLICAS": json.dumps({"0": {"is_held": True}})}
    ended = run(path, fake={"step_s": 0.005}, environ=environ)
    assert ended.code == 0, ended.stderr
    assert any("fake 0 did not start" in warning for warning in ended.result["warnings"])
    must_be_whole(folder, reference)


def test_where_no_device_starts_the_run_ends_with_75(folder: Place, tmp_path: Path) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    ended = run(path, fake={"is_held": True})
    assert ended.code == 75, ended.stderr
    assert "others hold the memory" in ended.result["message"]


def test_what_the_engine_refuses_ends_the_run_at_once(folder: Place, tmp_path: Path) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    ended = run(path, fake={"fail_build": "this cannot be"})
    assert (ended.code, ended.result["message"]) == (2, "this cannot be")
    assert ended.stderr.count("replica started") == 2


def test_fewer_replicas_are_started_for_few_rows(folder: Place, tmp_path: Path) -> None:
    write_input(folder, (20,))
    ended = run(write_job(tmp_path, job_on(folder, 4)))
    assert ended.code == 0, ended.stderr
    assert "2 of 4 replicas are started" in ended.stderr


def test_a_limit_is_of_all_rows_together(folder: Place, tmp_path: Path) -> None:
    write_input(folder)
    ended = run(write_job(tmp_path, job_on(folder, 2)), "--limit", "25")
    assert (ended.code, ended.result["rows"]) == (0, 25), ended.stderr
    assert ended.result["status"] == "partial"


def test_failed_rows_are_computed_again_by_several_replicas(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    assert run(path, fake={"reject_every": 5}).code == 3
    ended = run(path, "--retry-failed")
    assert ended.code == 0, ended.stderr
    must_be_whole(folder, reference)


def test_a_shard_that_cannot_be_read_keeps_no_other_from_its_end(
    folder: Place, tmp_path: Path
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_on(folder, 2))
    process = start(path, fake=SLOW)
    await_children(process.pid, 2)
    torn = Path(folder.url("in", "s1.parquet"))
    torn.write_bytes(torn.read_bytes()[:200])
    ended = wait(process)
    if ended.code == 0:
        pytest.skip("it was read before it was torn")
    assert ended.code == 2, ended.stderr
    assert "s1.parquet" in ended.result["message"]
    assert {"s0.parquet", "s2.parquet", "s3.parquet", "s4.parquet"} <= set(folder.names("out"))


def test_random_kills_of_replicas_and_parents_leave_each_row_once(
    place: Place, two: Path, reference: pl.DataFrame
) -> None:
    from tests.kills import kill_at_random

    kills = kill_at_random(two, place, num_kills=6, moments=random.Random(3))
    kills.must_stand()
    must_be_whole(place, reference)
