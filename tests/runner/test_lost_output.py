"""An output that others delete, move or change while a run works on it, or between two runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchinfer.sink import file_facts, write_table
from tests.support.endings import must_fail
from tests.support.jobs import (
    SLOW,
    Place,
    Process,
    job,
    results,
    rows,
    run,
    start,
    wait,
    wait_until,
    write_job,
)
from tests.support.s3_server import S3Server


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    folder.write_parquet("in/a.parquet", rows(300))
    folder.write_parquet("in/b.parquet", rows(20))
    return write_job(tmp_path, job(folder))


def started(folder: Place, path: Path) -> Process:
    """A run that has made some rows durable and has a second or more to go."""
    process = start(path, fake=SLOW)
    wait_until(lambda: len(folder.parts()) >= 3, what="three parts")
    return process


def must_be_whole(folder: Place) -> None:
    assert results(folder)["row"].to_list() == [*range(300), *range(20)]


def deleted(out: Path) -> None:
    # What is published meanwhile can make a folder that was just emptied non-empty again.
    wait_until(lambda: shutil.rmtree(out, ignore_errors=True) or not out.exists())


def moved(out: Path) -> None:
    out.rename(out.with_name("moved"))


def replaced(out: Path) -> None:
    moved(out)
    out.mkdir()


def without_records(out: Path) -> None:
    deleted(out / "_batchinfer")


@pytest.mark.parametrize("what", [deleted, moved, replaced, without_records])
def test_a_run_ends_if_its_output_goes_away(
    folder: Place, path: Path, what: Callable[[Path], None]
) -> None:
    """An output that goes away ends the run at once and the next start finishes."""
    process = started(folder, path)
    out = Path(folder.url("out"))
    what(out)
    ended = wait(process)
    must_fail(ended, 75, "was deleted, moved or replaced", "Start again")
    assert ended.result["rows_computed"] < 300, "it went on for nothing"
    assert not folder.parts(), "nobody could make sense of them"
    assert run(path).code == 0
    must_be_whole(folder)


def test_a_deleted_job_record_is_rewritten(folder: Place, path: Path) -> None:
    """While the run works, after it was killed, and after it was done."""
    record = Path(folder.url("out", "_batchinfer", "job.json"))
    process = started(folder, path)
    record.unlink()
    process.kill()
    process.communicate()
    ended = run(path)
    assert ended.code == 0, ended.stderr
    assert "job.json was missing" in ended.stderr
    assert ended.result["rows_computed"] < 320
    must_be_whole(folder)
    record.unlink()
    Path(folder.url("out", "_SUCCESS")).unlink()
    assert run(path).result["rows_computed"] == 0


@pytest.mark.parametrize("name", ["job.json", "runs/0001.json"])
def test_a_record_damaged_during_a_run_is_reported_at_its_end(
    name: str, folder: Place, path: Path
) -> None:
    process = started(folder, path)
    record = Path(folder.url("out", "_batchinfer", name))
    record.write_bytes(b"{")
    ended = wait(process)
    assert ended.code == 0, ended.stderr
    assert any(f"{record} is damaged" in text for text in ended.result["warnings"])
    done = results(folder)
    must_fail(run(path), 2, f"{record} is damaged", "Remove it and start again")
    record.unlink()
    again = run(path)
    assert again.code == 0 and again.result["rows_computed"] == 0
    assert results(folder).equals(done)


def test_parts_say_enough_to_continue_without_any_record(folder: Place, path: Path) -> None:
    """As when somebody deletes an output while a run works on it, and a part comes after that."""
    process = started(folder, path)
    process.kill()
    process.communicate()
    Path(folder.url("out", "_batchinfer", "job.json")).unlink()
    shutil.rmtree(folder.url("out", "_batchinfer", "runs"))
    assert run(path, "--limit", "1").code == 0
    changed = folder.read_parquet("in/a.parquet")
    folder.write_parquet("in/a.parquet", changed.head(299))
    must_fail(run(path), 2, "in/a.parquet", "changed since their rows were computed")
    folder.write_parquet("in/a.parquet", changed)
    ended = run(path)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] < 320
    must_be_whole(folder)


def test_parts_that_do_not_say_of_which_input_are_not_guessed_at(folder: Place, path: Path) -> None:
    """Those of version 0.1.0."""
    process = started(folder, path)
    process.kill()
    process.communicate()
    for name in folder.parts():
        part = Path(folder.url("out", name))
        table, facts = pq.read_table(part), file_facts(pq.read_metadata(part))
        assert facts is not None
        del facts["input"]
        with part.open("wb") as sink:
            write_table(sink, table, facts)
    Path(folder.url("out", "_batchinfer", "job.json")).unlink()
    shutil.rmtree(folder.url("out", "_batchinfer", "runs"))
    must_fail(run(path), 2, "job.json is missing", "do not say of which input")
    assert folder.parts()


def test_deleted_run_records_give_no_run_number_twice(folder: Place, path: Path) -> None:
    """A part's name has the run's number: the second run would write over the first one's."""
    process = started(folder, path)
    process.kill()
    process.communicate()
    for name in ("runs", "status", "logs"):
        shutil.rmtree(folder.url("out", "_batchinfer", name))
    ended = run(path)
    assert ended.code == 0, ended.stderr
    assert ended.result["run"] == 2
    must_be_whole(folder)


def test_parts_that_somebody_deletes_are_computed_again(folder: Place, path: Path) -> None:
    process = started(folder, path)
    for name in folder.parts()[:3]:
        Path(folder.url("out", name)).unlink()
    must_fail(wait(process), 75, "Start again")
    assert run(path).code == 0
    must_be_whole(folder)


def test_a_finished_file_that_somebody_deletes_is_not_a_partial_success(
    folder: Place, path: Path
) -> None:
    folder.write_parquet("in/0.parquet", rows(10))  # the first to be finished
    process = start(path, fake=SLOW)
    first = Path(folder.url("out", "0.parquet"))
    wait_until(first.exists, what="the first finished file")
    first.unlink()
    must_fail(wait(process), 75, "0.parquet was deleted", "Start again")
    assert run(path).result["rows_computed"] == 10


@pytest.mark.s3
def test_a_record_that_a_lifecycle_rule_deletes_is_written_again(
    server: S3Server, tmp_path: Path
) -> None:
    place = Place(f"s3://{server.create_bucket()}", server.environment())
    place.write_parquet("in/a.parquet", rows(60))
    path = write_job(tmp_path, job(place))
    process = start(path, place=place, fake=SLOW, environ={"FAKE_BEAT_S": "0.2"})
    wait_until(place.parts, what="a part")
    place.fs.rm(place.url("out", "_batchinfer", "job.json"))
    wait_until(
        lambda: "_batchinfer/job.json" in place.names("out") or process.poll() is not None,
        what="the record",
    )
    ended = wait(process)
    assert ended.code == 0, ended.stderr
    assert "_batchinfer/job.json" in place.names("out")


@pytest.mark.s3
@pytest.mark.parametrize("is_one_left", [False, True], ids=["all", "all but a part"])
def test_a_run_ends_if_its_prefix_is_emptied(
    server: S3Server, tmp_path: Path, is_one_left: bool
) -> None:
    """And the next start finishes, whatever a deletion that overtook a write has left."""
    place = Place(f"s3://{server.create_bucket()}", server.environment())
    place.write_parquet("in/a.parquet", rows(300))
    place.write_parquet("in/b.parquet", rows(20))
    path = write_job(tmp_path, job(place))
    process = start(path, place=place, fake={"step_s": 0.2, "max_num_seqs": 8})
    wait_until(lambda: len(place.parts()) >= 3 or process.poll() is not None, what="three parts")
    doomed = place.names("out")
    kept = place.parts()[:1] if is_one_left else []
    place.fs.rm([place.url("out", name) for name in doomed if name not in kept])
    ended = wait(process)
    must_fail(ended, 75, "was deleted, moved or replaced", "Start again")
    assert ended.result["rows_computed"] < 200, "it went on for nothing"
    assert not [n for n in place.names("out") if "/leases/" in n or "/status/" in n]
    ended = run(path, place=place)
    assert ended.code == 0, ended.stderr
    assert results(place)["row"].to_list() == [*range(300), *range(20)]


def test_few_open_files_make_more_merges_and_no_failure(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(300))
    sections = {"packing": {"window_rows": 1000}, "checkpoint": {"every_rows": 4, "every_s": 0.01}}
    path = write_job(tmp_path, job(folder, **sections))
    process = start(path, fake={"step_s": 0.02, "max_num_seqs": 8, "kill_at_step": 500})
    wait_until(
        lambda: len(folder.parts()) > 40 or process.poll() is not None, what="more than 40 parts"
    )
    process.kill()
    process.communicate()
    assert len(folder.parts()) > 40
    ended = run(path, environ={"FAKE_OPEN_FILES": "48"})
    assert ended.code == 0, ended.stderr
    assert results(folder)["row"].to_list() == [*range(300)]


def test_an_output_without_results_takes_other_window_rows(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(50))
    first = write_job(tmp_path, job(folder, packing={"window_rows": 1 << 20}))
    failed = run(first, fake={"fail_build": "no such engine"})
    must_fail(failed, 2, "no such engine")
    ended = run(write_job(tmp_path, job(folder, packing={"window_rows": 16})))
    assert ended.code == 0, ended.stderr
    assert "window_rows stays" not in ended.stderr
    assert results(folder)["row"].to_list() == [*range(50)]
