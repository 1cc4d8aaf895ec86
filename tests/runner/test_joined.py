"""Runs that join: any number share an output, each row once, whoever is killed or comes late."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.kills import kill_joined_at_random, requests_of
from tests.kills import write_input as write_sizes
from tests.support.jobs import (
    Place,
    job,
    kill,
    results,
    rows,
    run,
    stable,
    start,
    wait,
    wait_until,
    write_job,
)
from tests.support.processes import await_children, is_stopped, kill_one

#: One large shard, many pieces; small ones of one piece; one without rows.
NUM_ROWS = (500, 50, 0, 1, 30)
SLOW = {"step_s": 0.01, "max_num_seqs": 8}
#: For one that is killed before its end.
ENDLESS = {"step_s": 0.2, "max_num_seqs": 32}
_KEY = ["shard", "row", "sample"]


def write_input(place: Place) -> None:
    write_sizes(place, NUM_ROWS)


def job_of(place: Place, **sections: Any) -> dict[str, Any]:
    return job(place, engine={"name": "fake"}, **sections)


def num_durable(place: Place) -> int:
    """Results in parts and finished files, each once. Nothing runs meanwhile."""
    names = [name for name in place.names("out") if name.endswith((".part", ".parquet"))]
    frames = [place.read_parquet(f"out/{name}").select(_KEY) for name in names]
    return pl.concat(frames).n_unique() if frames else 0


def must_be_whole(place: Place, reference: pl.DataFrame) -> None:
    have = results(place)
    assert have.group_by("shard", "row", "sample").len()["len"].max() == 1
    assert stable(have).equals(reference)
    names = place.names("out")
    assert "_SUCCESS" in names
    assert not [n for n in names if "/parts/" in n or "/pieces/" in n]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What one run gives that owns the whole."""
    folder = tmp_path_factory.mktemp("reference")
    place = Place(str(folder / "data"))
    write_input(place)
    ended = run(write_job(folder, job_of(place)))
    assert ended.code == 0, ended.stderr
    return stable(results(place))


@pytest.fixture
def path(place: Place, tmp_path: Path) -> Path:
    """The input, and a job over it."""
    write_input(place)
    return write_job(tmp_path, job_of(place))


def test_one_that_joins_alone_gives_the_rows_of_a_whole_run(
    place: Place, path: Path, reference: pl.DataFrame
) -> None:
    ended = run(path, "--join", place=place)
    assert ended.code == 0, ended.stderr
    assert ended.result["status"] == "complete"
    assert ended.result["rows_computed"] == sum(NUM_ROWS)
    must_be_whole(place, reference)
    again = run(path, "--join", place=place)
    assert (again.code, again.result["rows_computed"]) == (0, 0)
    assert run(path, place=place).result["status"] == "complete"


def test_three_share_the_rows_and_each_row_is_computed_once(
    place: Place, path: Path, reference: pl.DataFrame
) -> None:
    processes = [start(path, "--join", place=place, fake=SLOW) for _ in range(3)]
    ended = [wait(process) for process in processes]
    assert [e.code for e in ended] == [0, 0, 0], [e.stderr for e in ended]
    must_be_whole(place, reference)
    computed = [e.result["rows_computed"] for e in ended]
    assert sum(computed) == sum(NUM_ROWS)
    assert all(computed), "each had its share"
    assert all(e.result["status"] == "complete" for e in ended)
    assert all(e.result["rows"] == sum(NUM_ROWS) for e in ended)


def test_what_a_killed_one_had_is_taken_over_and_nothing_durable_computed_again(
    place: Place, path: Path, tmp_path: Path, reference: pl.DataFrame
) -> None:
    asked = tmp_path / "asked"
    fake = SLOW | {"log_file": str(asked)}
    first = start(path, "--join", place=place, fake=fake)
    wait_until(lambda: len(place.parts()) >= 4, what="parts")
    kill(first)
    first.communicate()
    before = num_durable(place)
    num_asked = len(asked.read_text().splitlines())
    others = [start(path, "--join", place=place, fake=fake) for _ in range(2)]
    for other in others:
        ended = wait(other)
        assert ended.code == 0, ended.stderr
    must_be_whole(place, reference)
    again = asked.read_text().splitlines()[num_asked:]
    assert len(again) == len(set(again)) == sum(NUM_ROWS) - before


def test_a_plain_start_is_refused_beside_joined_runs_and_resumes_after_them(
    place: Place, path: Path, reference: pl.DataFrame
) -> None:
    joined = start(path, "--join", place=place, fake=ENDLESS)
    wait_until(lambda: place.parts(), what="a part")
    for options in ((), ("--slice", "1/2")):
        refused = run(path, *options, place=place)
        assert refused.code == 75, refused.stderr
        assert "joined runs are working on" in refused.result["message"]
        assert f"pid {joined.pid}" in refused.result["message"]
    skipped = run(path, "--if-running", "skip", place=place)
    assert (skipped.code, skipped.result["status"]) == (0, "skipped")
    kill(joined)
    joined.communicate()
    ended = run(path, place=place)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] < sum(NUM_ROWS)
    must_be_whole(place, reference)
    assert not [n for n in place.names("out") if "/join-" in n]


@pytest.mark.parametrize("options", [(), ("--slice", "1/2")], ids=["whole", "slice"])
def test_joining_is_refused_beside_a_run_that_owns_rows(
    options: tuple[str, ...], place: Place, path: Path
) -> None:
    owner = start(path, *options, place=place, fake=ENDLESS)
    wait_until(lambda: place.parts(), what="a part")
    refused = run(path, "--join", place=place)
    assert refused.code == 75, refused.stderr
    assert f"pid {owner.pid}" in refused.result["message"]
    skipped = run(path, "--join", "--if-running", "skip", place=place)
    assert (skipped.code, skipped.result["status"]) == (0, "skipped")
    kill(owner)
    owner.communicate()
    assert run(path, "--join", place=place).code == 0


#: A member that nobody has seen change for so long is gone, and beats that often.
IMPATIENT = {"FAKE_STALE_S": "4", "FAKE_BEAT_S": "0.5"}


@pytest.mark.parametrize(
    "frozen",
    [
        {"key": r"parts/s0.*\.part$", "nth": 3},
        {"key": r"parts/s1.*\.part$"},
        {"key": r"s1\.parquet$"},
        {"key": r"s0\.parquet$"},
    ],
    ids=["a part of many", "a part of the one piece", "a file of one piece", "a fold"],
)
def test_what_one_wrote_that_was_frozen_past_its_lease_adds_no_row(
    frozen: dict[str, Any], folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    """The worst moment: written, and not visible yet, when the others go on and finish."""
    write_input(folder)
    path = write_job(tmp_path, job_of(folder))
    crash = {"op": "publish", "when": "written", "signal_name": "SIGSTOP", **frozen}
    first = start(path, "--join", fake=SLOW, crash=crash, environ=IMPATIENT)
    wait_until(lambda: is_stopped(first.pid), what="the stop")
    other = run(path, "--join", environ=IMPATIENT)
    assert (other.code, other.result["status"]) == (0, "complete"), other.stderr
    kill(first, signal.SIGCONT)
    ended = wait(first)
    assert (ended.code, ended.result["status"]) == (0, "complete"), ended.stderr
    must_be_whole(folder, reference)


def test_one_that_wakes_up_beside_who_took_over_drops_what_it_had(
    place: Place, path: Path, reference: pl.DataFrame
) -> None:
    first = start(path, "--join", place=place, fake=SLOW, environ=IMPATIENT)
    wait_until(lambda: len(place.parts()) >= 2, what="parts")
    kill(first, signal.SIGSTOP)
    other = start(path, "--join", place=place, fake=SLOW, environ=IMPATIENT)
    wait_until(lambda: any("-000002.lease" in name for name in place.names("out")), what="a lease")
    kill(first, signal.SIGCONT)
    for process in (first, other):
        ended = wait(process)
        assert (ended.code, ended.result["status"]) == (0, "complete"), ended.stderr
    must_be_whole(place, reference)


def test_ten_that_join_and_are_killed_at_random_end_with_each_row_once(
    place: Place, tmp_path: Path
) -> None:
    """And no row that was durable at a kill is asked of an engine after it."""
    crc_of, alone = requests_of(tmp_path, NUM_ROWS)
    write_input(place)
    kills = kill_joined_at_random(
        write_job(tmp_path, job_of(place)),
        place,
        num_kills=8,
        num_runs=10,
        moments=random.Random(place.is_s3),
        crc_of=crc_of,
        pause_s=0.8,
    )
    assert kills.num_kills >= 2
    kills.must_stand()
    must_be_whole(place, stable(results(alone)))


def test_limit_computes_so_many_rows_and_gives_the_rest_back(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_of(folder))
    ended = run(path, "--join", "--limit", "40")
    assert (ended.code, ended.result["status"]) == (0, "partial"), ended.stderr
    assert ended.result["rows_computed"] == 40
    ended = run(path, "--join")
    assert (ended.code, ended.result["rows_computed"]) == (0, sum(NUM_ROWS) - 40), ended.stderr
    must_be_whole(folder, reference)


def test_a_job_that_differs_is_refused(folder: Place, tmp_path: Path) -> None:
    write_input(folder)
    assert run(write_job(tmp_path, job_of(folder)), "--join", "--limit", "5").code == 0
    other = write_job(tmp_path, job_of(folder, sampling={"max_tokens": 8}), "other.yaml")
    refused = run(other, "--join")
    assert refused.code == 2
    assert "sampling.max_tokens" in refused.result["message"]


def test_an_input_file_that_changes_meanwhile_is_an_error_and_the_others_finish(
    folder: Place, tmp_path: Path
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_of(folder))
    joined = start(path, "--join", fake=SLOW)
    wait_until(lambda: len(folder.parts()) >= 2, what="parts")
    folder.write_parquet("in/s0.parquet", rows(400, start=7000))
    ended = wait(joined)
    assert ended.code == 2, ended.stderr
    assert "s0.parquet" in ended.result["message"]
    names = folder.names("out")
    assert "s0.parquet" not in names and "_SUCCESS" not in names
    assert {"s1.parquet", "s2.parquet", "s3.parquet", "s4.parquet"} <= set(names)


@pytest.mark.parametrize(
    "options", [("--slice", "1/2"), ("--restart",), ("--retry-failed",)], ids=lambda o: o[0]
)
def test_options_that_joined_runs_do_not_have_are_refused(
    options: tuple[str, ...], folder: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job_of(folder))
    ended = run(path, "--join", *options)
    assert ended.code == 2
    assert options[0] in ended.result["message"] and "--join" in ended.result["message"]


def test_a_promise_of_a_single_writer_is_refused(folder: Place, tmp_path: Path) -> None:
    write_input(folder)
    settings = job_of(folder)
    settings["output"]["single_writer"] = True
    ended = run(write_job(tmp_path, settings), "--join")
    assert ended.code == 2
    assert "output.single_writer" in ended.result["message"]
    assert folder.names("out") == []


def test_leases_that_promise_rows_that_were_deleted_heal(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    path = write_job(tmp_path, job_of(folder))
    crash = {"op": "create", "key": r"fold-", "when": "after"}
    assert run(path, "--join", crash=crash).code == -9
    Path(folder.url("out", folder.parts()[0])).unlink()
    ended = run(path, "--join")
    assert ended.code == 75, ended.stderr
    assert run(path, "--join").code == 0
    must_be_whole(folder, reference)


def test_several_devices_of_each_of_two_joined_runs_share_the_rows(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    """And a replica that is killed is started again by its own."""
    write_input(folder)
    settings = job(folder, engine={"name": "fake", "devices": 2})
    path = write_job(tmp_path, settings)
    processes = [start(path, "--join", fake=SLOW) for _ in range(2)]
    replica, _ = await_children(processes[0].pid, 2)
    wait_until(lambda: folder.parts(), what="a part")
    kill_one(replica, signal.SIGKILL)
    ended = [wait(process) for process in processes]
    assert [e.code for e in ended] == [0, 0], [e.stderr for e in ended]
    assert all(e.result["status"] == "complete" for e in ended)
    assert all(e.result["rows_computed"] for e in ended), "each had its share"
    must_be_whole(folder, reference)


def test_what_a_killed_run_of_several_devices_had_goes_to_one_of_a_single_device(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    write_input(folder)
    two = write_job(tmp_path, job(folder, engine={"name": "fake", "devices": 2}), "two.yaml")
    first = start(two, "--join", fake=SLOW)
    await_children(first.pid, 2)
    wait_until(lambda: len(folder.parts()) >= 3, what="parts")
    kill_one(first.pid, signal.SIGKILL)
    first.communicate()
    ended = run(write_job(tmp_path, job_of(folder)), "--join")
    assert (ended.code, ended.result["status"]) == (0, "complete"), ended.stderr
    assert ended.result["rows_computed"] < sum(NUM_ROWS)
    must_be_whole(folder, reference)
