"""Nothing of another output is deleted, swept, read as a result or counted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.endings import must_fail
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, run, write_job
from tests.support.s3_server import S3Server


@pytest.fixture
def jobs(tmp_path: Path) -> Any:
    """Makes the job file of an output; each output has settings, and so a digest, of its own."""

    def make(place: Place, output: str, **sections: Any) -> Path:
        settings = job(place, output, prompt={"template": f"{output} {{{{ text }}}}"}, **sections)
        return write_job(tmp_path, settings, f"{output.replace('/', '-')}.yaml")

    return make


@pytest.fixture
def place(place: Place) -> Place:
    place.write_parquet("in/a.parquet", rows(20))
    return place


@pytest.fixture
def folder(folder: Place) -> Place:
    folder.write_parquet("in/a.parquet", rows(20))
    return folder


def files(place: Place, output: str) -> list[str]:
    """What an output has, without the traces that a start leaves which changes nothing."""
    return [n for n in place.names(output) if "/leases/" not in n]


def ends_well(path: Path, place: Place, *arguments: str) -> None:
    ended = run(path, *arguments, place=place)
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("arguments", [(), ("--restart",), ("--slice", "1/1")])
@pytest.mark.parametrize("below", ["", "new/deep/"])
def test_a_start_that_is_refused_leaves_no_file_and_no_folder(
    folder: Place, jobs: Any, below: str, arguments: tuple[str, ...]
) -> None:
    """Traces of an output would stand in the way of others."""
    ends_well(jobs(folder, "out/second"), folder)
    before = sorted(Path(folder.root).rglob("*"))
    if not below:
        must_fail(run(jobs(folder, "out"), *arguments, place=folder), 2, "another output")
    typo = jobs(folder, f"{below}out/third", input={"keep_columns": ["no such"]})
    must_fail(run(typo, *arguments, place=folder), 2, "no such")
    assert sorted(Path(folder.root).rglob("*")) == before


@pytest.mark.parametrize("arguments", [(), ("--restart",)], ids=["start", "restart"])
def test_an_output_with_another_inside_is_refused_and_nothing_is_deleted(
    place: Place, jobs: Any, arguments: tuple[str, ...]
) -> None:
    ends_well(jobs(place, "out/second"), place)
    before = files(place, "out")
    must_fail(run(jobs(place, "out"), *arguments, place=place), 2, "out/second", "another output")
    assert files(place, "out") == before
    ends_well(jobs(place, "out/second"), place, "--restart")


def test_an_output_does_not_begin_inside_another_and_leaves_that_as_it_was(
    place: Place, jobs: Any
) -> None:
    ends_well(jobs(place, "out"), place)
    before = files(place, "out")
    must_fail(run(jobs(place, "out/deep/second"), place=place), 2, "is inside another output")
    assert files(place, "out") == before
    ends_well(jobs(place, "out"), place, "--restart")
    assert results(place).height == 20


def test_an_output_whose_name_begins_like_anothers_is_not_touched(place: Place, jobs: Any) -> None:
    ends_well(jobs(place, "out2"), place)
    ends_well(jobs(place, "out"), place)
    before = files(place, "out2")
    ends_well(jobs(place, "out"), place, "--restart")
    assert files(place, "out2") == before


def test_a_restart_after_other_settings_deletes_the_earlier_results(
    folder: Place, jobs: Any
) -> None:
    ends_well(jobs(folder, "out"), folder)
    changed = jobs(folder, "out", sampling={"max_tokens": 4})
    must_fail(run(changed, place=folder), 2, "max_tokens")
    ends_well(changed, folder, "--restart")
    assert results(folder)["num_completion_tokens"].max() <= 4


@pytest.mark.parametrize("linked", ["other", "other/part"])
def test_a_link_to_another_output_is_refused_and_nothing_is_deleted(
    folder: Place, tmp_path: Path, linked: str
) -> None:
    """Also to a folder inside it, and also if that is an output of the very same job."""
    folder.write_parquet("in/part/a.parquet", rows(20))
    sections = {"input": {"path": folder.url("in", "**", "*.parquet")}}
    mine = write_job(tmp_path, job(folder, **sections), "mine.yaml")
    ends_well(mine, folder)
    ends_well(write_job(tmp_path, job(folder, "other", **sections), "other.yaml"), folder)
    before = files(folder, "other")
    shutil.rmtree(folder.url("out", "part"))
    Path(folder.url("out", "part")).symlink_to(folder.url(linked))
    must_fail(run(mine, "--restart"), 2, "out/part", "another output", "Nothing was deleted")
    assert files(folder, "other") == before


def test_a_folder_of_the_output_may_be_a_link_to_another_disk(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/part/a.parquet", rows(20))
    sections = {"input": {"path": folder.url("in", "**", "*.parquet")}}
    Path(folder.url("disk")).mkdir()
    Path(folder.url("out")).mkdir()
    Path(folder.url("out", "part")).symlink_to(folder.url("disk"))
    mine = write_job(tmp_path, job(folder, **sections))
    ends_well(mine, folder)
    ends_well(mine, folder, "--restart")
    assert folder.names("disk") == ["a.parquet"]


def test_a_result_of_another_output_is_neither_deleted_nor_counted(
    folder: Place, jobs: Any
) -> None:
    """Somebody copied it here, once under a name of its own and once over one of ours."""
    ends_well(jobs(folder, "other"), folder)
    ends_well(jobs(folder, "out"), folder)
    foreign = Path(folder.url("other", "a.parquet")).read_bytes()
    for name in ("b.parquet", "a.parquet"):
        copied = Path(folder.url("out", name))
        copied.write_bytes(foreign)
        must_fail(run(jobs(folder, "out"), "--restart"), 2, name, "Nothing was deleted")
        Path(folder.url("out", "_SUCCESS")).unlink(missing_ok=True)
        must_fail(run(jobs(folder, "out")), 2, name)
        assert copied.read_bytes() == foreign
        copied.unlink()


def test_a_sweep_leaves_what_others_are_writing(folder: Place, jobs: Any) -> None:
    path = jobs(folder, "out")
    ends_well(path, folder)
    foreign = [".notes.txt.0a1b2c3d.tmp", "notes/.a.parquet.0a1b2c3d.tmp"]
    mine = [".a.parquet.0a1b2c3d.tmp", "_batchinfer/.job.json.0a1b2c3d.tmp"]
    for name in [*foreign, *mine]:
        file = Path(folder.url("out", name))
        file.parent.mkdir(exist_ok=True)
        file.touch()
    ends_well(path, folder, "--restart")
    names = folder.names("out")
    assert set(foreign) <= set(names)
    assert not set(mine) & set(names)


def test_the_root_of_the_file_system_is_not_an_output(folder: Place, jobs: Any) -> None:
    must_fail(run(jobs(folder, "out"), "--set", "output.path=/"), 2, "output.path")


@pytest.fixture
def two_shards(folder: Place, tmp_path: Path) -> Path:
    folder.write_parquet("in/b.parquet", rows(20, start=20))
    return write_job(tmp_path, job(folder))


def test_a_copy_of_another_shards_results_is_refused_and_its_rows_come_back(
    folder: Place, two_shards: Path
) -> None:
    ends_well(two_shards, folder)
    copied = Path(folder.url("out", "b.parquet"))
    shutil.copy(folder.url("out", "a.parquet"), copied)
    Path(folder.url("out", "_SUCCESS")).unlink()
    problem = "b.parquet is the finished file of a.parquet, not of b.parquet: move it away"
    must_fail(run(two_shards), 2, problem)
    must_fail(run(two_shards, "--retry-failed"), 2, problem)
    planned = run(two_shards, command=("plan",))
    assert planned.code == 2 and problem in planned.stderr
    assert not Path(folder.url("out", "_SUCCESS")).exists()
    copied.unlink()
    ends_well(two_shards, folder)
    assert results(folder)["id"].to_list() == [f"row-{n}" for n in range(40)]


def test_an_output_that_is_a_link_to_nothing_is_named(folder: Place, jobs: Any) -> None:
    Path(folder.url("out")).symlink_to(folder.url("nowhere"))
    refused = run_here(jobs(folder, "out"))
    assert refused.code == 2 and f"{folder.url('out')} is a link to nothing" in refused.message
    Path(folder.url("nowhere")).mkdir()
    assert run_here(jobs(folder, "out")).code == 0


@pytest.mark.s3
def test_a_key_with_an_empty_part_is_a_strange_file(server: S3Server, jobs: Any) -> None:
    place = Place(f"s3://{server.create_bucket()}", server.environment())
    place.write_parquet("in/a.parquet", rows(20))
    place.write_parquet("out//a.parquet", rows(3))
    must_fail(run(jobs(place, "out"), place=place), 2, "out//a.parquet is not a result of this job")


@pytest.mark.s3
def test_an_input_key_that_no_file_can_have_is_refused(server: S3Server, jobs: Any) -> None:
    place = Place(f"s3://{server.create_bucket()}", server.environment())
    place.write_parquet("in/../a.parquet", rows(20))
    path = jobs(place, "out", input={"path": place.url("in", ".*", "*.parquet")})
    must_fail(run(path, place=place), 2, "../a.parquet", "not a name")
