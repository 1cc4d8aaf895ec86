"""Runs that join: any number share an output, each row once, whoever is killed or comes late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

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

#: One large shard, many pieces; small ones of one piece; one without rows.
NUM_ROWS = (500, 50, 0, 1, 30)
SLOW = {"step_s": 0.01, "max_num_seqs": 8}
#: For one that is killed before its end.
ENDLESS = {"step_s": 0.2, "max_num_seqs": 32}
_KEY = ["shard", "row", "sample"]


def write_input(place: Place, num_rows: Sequence[int] = NUM_ROWS) -> None:
    first = 0
    for index, number in enumerate(num_rows):
        place.write_parquet(f"in/s{index}.parquet", rows(number, start=first))
        first += number


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
