"""Killed at any step, started again: every row once, nothing published is computed again."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support.jobs import Ended, Place, job, kill, results, rows, run, stable, start, write_job
from tests.support.scoring import job_of_task

NUM_ROWS = (100, 70, 0, 1)

#: step -> (crash, what the killed start is called with)
STEPS: dict[str, dict[str, Any]] = {
    "job record created": {"op": "create", "key": r"job\.json", "when": "after"},
    "run number created": {"op": "create", "key": r"runs/", "when": "after"},
    "first temporary part written": {"op": "publish", "key": r"parts/", "when": "written"},
    "later temporary part written": {
        "op": "publish",
        "key": r"parts/",
        "when": "written",
        "nth": 4,
    },
    "part published": {"op": "publish", "key": r"parts/", "when": "after", "nth": 3},
    "temporary finished file written": {"op": "publish", "key": r"\.parquet$", "when": "written"},
    "finished file published": {"op": "publish", "key": r"\.parquet$", "when": "after"},
    "last finished file published": {
        "op": "publish",
        "key": r"\.parquet$",
        "when": "after",
        "nth": 4,
    },
    "between deletes of folded parts": {"op": "delete", "key": r"parts/", "when": "after"},
    "before _SUCCESS": {"op": "put", "key": "_SUCCESS", "when": "before"},
    "after _SUCCESS": {"op": "put", "key": "_SUCCESS", "when": "after"},
}

RESTART_STEPS: dict[str, dict[str, Any]] = {
    "marker written": {"op": "put", "key": r"restart\.json", "when": "after"},
    "_SUCCESS deleted": {"op": "delete", "key": "_SUCCESS", "when": "after"},
    "one finished file deleted": {"op": "delete", "key": r"\.parquet$", "when": "after"},
    "job record deleted": {"op": "delete", "key": r"job\.json", "when": "after"},
    "marker deleted": {"op": "delete", "key": r"restart\.json", "when": "after"},
}

RETRY_STEPS: dict[str, dict[str, Any]] = {
    "_SUCCESS deleted": {"op": "delete", "key": "_SUCCESS", "when": "after"},
    "part of retried rows published": {"op": "publish", "key": r"parts/", "when": "after"},
    "refolded file written": {"op": "publish", "key": r"\.parquet$", "when": "written"},
    "refolded file published": {"op": "publish", "key": r"\.parquet$", "when": "after"},
    "between deletes": {"op": "delete", "key": r"parts/", "when": "after"},
}


def write_input(place: Place) -> None:
    start_row = 0
    for index, num_rows in enumerate(NUM_ROWS):
        place.write_parquet(f"in/s{index}.parquet", rows(num_rows, start=start_row))
        start_row += num_rows


def must_kill(ended: Ended) -> None:
    assert ended.code == -9, f"the crash step was not reached: {ended.code}\n{ended.stderr}"


def must_be_whole(place: Place, reference: pl.DataFrame) -> pl.DataFrame:
    """Each row once, in input order, equal to an uninterrupted run; nothing else left behind."""
    have = results(place)
    assert have.group_by("shard", "row", "sample").len()["len"].max() == 1
    assert have.height == sum(NUM_ROWS)
    assert stable(have).equals(reference)
    names = place.names("out")
    assert [n for n in names if n.endswith(".parquet")] == [
        f"s{i}.parquet" for i in range(len(NUM_ROWS))
    ]
    assert "_SUCCESS" in names
    left = [n for n in names if "/parts/" in n or n.endswith(".tmp") or "restart" in n]
    assert not left
    return have


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pl.DataFrame]:
    """What an uninterrupted run of a task gives."""

    @cache
    def compute(task: str) -> pl.DataFrame:
        folder = tmp_path_factory.mktemp("reference")
        place = Place(str(folder / "data"))
        write_input(place)
        ended = run(write_job(folder, job_of_task(task, place)))
        assert ended.code == 0, ended.stderr
        return stable(results(place))

    return compute


@pytest.fixture
def task(request: pytest.FixtureRequest) -> str:
    """Generation, unless a test asks for each task in turn (`EACH_TASK`)."""
    return getattr(request, "param", "generate")


#: Of generation in both places. What a task writes goes to a bucket as all else does, so the other
#: one is killed on a local disk alone: a run in a bucket costs five times as much.
EACH_TASK = pytest.mark.parametrize(
    ("place", "task"),
    [
        ("local", "generate"),
        ("local", "score"),
        pytest.param("s3", "generate", marks=pytest.mark.s3),
    ],
    indirect=True,
)


@pytest.fixture
def reference(references: Callable[[str], pl.DataFrame], task: str) -> pl.DataFrame:
    return references(task)


@pytest.fixture
def prepared(place: Place, tmp_path: Path, task: str) -> Path:
    """The input, and a job over it."""
    write_input(place)
    return write_job(tmp_path, job_of_task(task, place))


@EACH_TASK
@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_a_step_is_finished_by_the_next_start(
    step: str, place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    must_kill(run(prepared, place=place, crash=STEPS[step], fake={"step_s": 0.005}))
    ended = run(prepared, place=place)
    assert ended.code == 0, ended.stderr
    must_be_whole(place, reference)


@pytest.mark.parametrize("step", RESTART_STEPS)
def test_a_killed_restart_is_finished_by_the_next_start(
    step: str, place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    """A restart killed at a step is finished by the next start without the flag."""
    assert run(prepared, place=place).code == 0
    must_kill(run(prepared, "--restart", place=place, crash=RESTART_STEPS[step]))
    ended = run(prepared, place=place)
    assert ended.code == 0, ended.stderr
    have = must_be_whole(place, reference)
    assert have["attempt"].min() >= 2, "results from before the restart were kept"


@EACH_TASK
@pytest.mark.parametrize("step", RETRY_STEPS)
def test_a_retry_killed_at_a_step_loses_no_result(
    step: str, place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    failing = run(prepared, place=place, fake={"reject_every": 5})
    assert failing.code == 3, failing.stderr
    num_failed = failing.result["rows_failed"]
    assert num_failed == results(place).filter(pl.col("error_type").is_not_null()).height > 0
    must_kill(run(prepared, "--retry-failed", place=place, crash=RETRY_STEPS[step]))
    again = run(prepared, place=place)
    assert again.code in (0, 3), again.stderr
    last = run(prepared, "--retry-failed", place=place)
    assert last.code == 0, last.stderr
    have = must_be_whole(place, reference)
    assert have.filter(pl.col("attempt") == 1).height >= sum(NUM_ROWS) - num_failed


def test_rows_of_published_parts_are_never_computed_again(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    must_kill(
        run(
            prepared,
            place=place,
            crash={"op": "publish", "key": "parts/", "when": "after", "nth": 4},
            fake={"step_s": 0.005},
        )
    )
    parts = [n for n in place.names("out") if n.endswith(".part")]
    assert parts
    before = pl.concat([place.read_parquet(f"out/{n}") for n in parts])
    assert run(prepared, place=place).code == 0
    after = must_be_whole(place, reference)
    key = ["shard", "row", "sample"]
    assert before.sort(key).equals(after.join(before.select(key), on=key, how="semi").sort(key))


@EACH_TASK
def test_twenty_kills_at_random_times_leave_each_row_exactly_once(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    moments = random.Random(7)
    for _ in range(20):
        process = start(prepared, place=place, fake={"step_s": 0.02, "max_num_seqs": 8})
        time.sleep(moments.uniform(0.5, 2.0))
        kill(process)
        process.communicate()
        if process.returncode == 0:
            break
    for _ in range(3):
        ended = run(prepared, place=place)
        if ended.code != 1:  # 1: the last two were killed before their first durable row
            break
    assert ended.code == 0, ended.stderr
    must_be_whole(place, reference)


def test_two_concurrent_runners_do_the_work_once(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    processes = [start(prepared, place=place, fake={"step_s": 0.2}) for _ in range(2)]
    codes = sorted(p.wait(150) for p in processes)
    errors = [p.communicate()[1] for p in processes]
    assert codes == [0, 75], errors
    assert any("another run is working on" in e for e in errors)
    must_be_whole(place, reference)


def test_a_second_runner_that_ignores_the_lease_does_no_harm(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    """What a lost or stolen lease comes to: both compute, both fold, every row is there once."""
    environ = {"FAKE_NO_LEASE": "1"}
    processes = [
        start(prepared, place=place, fake={"step_s": 0.01}, environ=environ) for _ in range(2)
    ]
    ended = [p.wait(150) for p in processes]
    errors = [p.communicate()[1] for p in processes]
    assert 0 in ended, errors
    assert run(prepared, place=place).code == 0
    must_be_whole(place, reference)


def test_a_killed_run_leaves_the_lease_to_the_next_immediately(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    must_kill(
        run(
            prepared,
            place=place,
            crash={"op": "publish", "key": "parts/", "when": "after"},
            fake={"step_s": 0.01},
        )
    )
    begun = time.monotonic()
    assert run(prepared, place=place).code == 0
    assert time.monotonic() - begun < 28


def test_two_deaths_without_progress_name_the_rows_in_flight(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    for _ in range(2):
        must_kill(run(prepared, place=place, fake={"kill_at_step": 1}))
    refused = run(prepared, place=place)
    assert refused.code == 1
    assert re.search(r"s\d\.parquet:\d+", refused.stderr)
    ended = run(prepared, place=place)
    assert ended.code == 0, "the start after the refusal tries once more"
    must_be_whole(place, reference)


def test_an_engine_that_dies_keeps_what_is_finished(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    died = run(prepared, place=place, fake={"die_at_step": 20, "step_s": 0.01})
    assert died.code == 75, died.stderr
    num_durable = died.result["rows"]
    assert num_durable > 0
    ended = run(prepared, place=place)
    assert ended.code == 0
    assert ended.result["rows_computed"] == sum(NUM_ROWS) - num_durable
    must_be_whole(place, reference)


def test_the_pipe_of_a_dead_scheduler_does_not_stop_the_run(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    process = start(prepared, place=place, fake={"step_s": 0.01})
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    assert process.wait(150) == 0
    must_be_whole(place, reference)


def test_a_row_that_kills_the_engine_is_named_after_two_deaths_of_it(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    for _ in range(2):
        died = run(prepared, place=place, fake={"die_at_step": 1})
        assert died.code == 75, died.stderr
    refused = run(prepared, place=place)
    assert refused.code == 1
    named = re.findall(r"s\d\.parquet:\d+", refused.stderr)
    assert 0 < len(set(named)) <= 8, "after the first death few rows are in flight"
    assert run(prepared, place=place).code == 0
    must_be_whole(place, reference)


def test_a_slice_is_refused_once_and_not_for_ever_after_two_deaths(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/a.parquet", rows(50))
    path = write_job(tmp_path, job(folder))
    for _ in range(2):
        must_kill(run(path, "--shard", "1/2", fake={"kill_at_step": 1}))
    assert [run(path, "--shard", "1/2").code for _ in range(2)] == [1, 0]


def test_kills_that_left_durable_rows_do_not_count_as_deaths(
    place: Place, prepared: Path, reference: pl.DataFrame
) -> None:
    crash = {"op": "publish", "key": "parts/", "when": "after"}
    for _ in range(3):
        must_kill(run(prepared, place=place, crash=crash, fake={"step_s": 0.05}))
    assert run(prepared, place=place).code == 0
    must_be_whole(place, reference)
