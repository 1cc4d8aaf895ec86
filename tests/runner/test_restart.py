"""`--restart` deletes what its own job asked to have deleted, whenever it ends and in any order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import ConfigError
from batchinfer.runner import RunOptions, ownership
from batchinfer.storage import Store
from batchinfer.storage.local import LocalStore
from tests.support.endings import must_fail
from tests.support.in_process import EndedHere, run_here
from tests.support.jobs import Place, job, results, rows, run, write_job
from tests.support.s3_server import S3Server

MARKER = "_batchinfer/restart.json"
RESTART = RunOptions(restart=True)


class Killed(BaseException):
    """What ends a process at once: nothing handles it."""


#: Where a restart is killed: (method, end of the key) -> the files of the other job that are left.
STEPS = {
    ("put", "restart.json"): 2,  # the marker is written
    ("delete", "_SUCCESS"): 2,
    ("delete", "a.parquet"): 1,
    ("delete", "b.parquet"): 0,
    ("delete", "job.json"): 0,
}
HALFWAY = ("delete", "a.parquet")


@pytest.fixture
def place(folder: Place) -> Place:
    for name in ("a", "b"):
        folder.write_parquet(f"in/{name}.parquet", rows(10))
    return folder


@pytest.fixture
def first(place: Place, tmp_path: Path) -> Path:
    """A job whose output is complete."""
    path = write_job(tmp_path, job(place), "first.yaml")
    assert run_here(path).code == 0
    return path


@pytest.fixture
def second(place: Place, tmp_path: Path) -> Path:
    """Another job for the same output."""
    return write_second(place, tmp_path)


def write_second(place: Place, folder: Path) -> Path:
    settings = job(place, name="second", prompt={"template": "Say {{ text }}"})
    return write_job(folder, settings, "second.yaml")


def kill_restart(path: Path, step: tuple[str, str]) -> None:
    """Killed right after the step; what a process holds besides files is given back."""
    op, name = step
    with pytest.MonkeyPatch.context() as patched:
        if op == "put":
            put = LocalStore.put

            def killed_put(self: LocalStore, key: str, content: bytes) -> None:
                put(self, key, content)
                if key.endswith(name):
                    raise Killed

            patched.setattr(LocalStore, "put", killed_put)
        else:
            fail_deletes(patched, name, after=Killed())
        with pytest.raises(Killed):
            run_here(path, RESTART)


def fail_deletes(
    patched: pytest.MonkeyPatch,
    name: str,
    *,
    before: BaseException | None = None,
    after: BaseException | None = None,
) -> None:
    delete = LocalStore.delete

    def failing(self: LocalStore, keys: Iterable[str]) -> None:
        for key in keys:
            if key.endswith(name) and before is not None:
                raise before
            delete(self, [key])
            if key.endswith(name) and after is not None:
                raise after

    patched.setattr(LocalStore, "delete", failing)


def result_files(place: Place) -> list[str]:
    return [n for n in place.names("out") if n.endswith((".parquet", ".part"))]


def is_pending(place: Place) -> bool:
    return MARKER in place.names("out")


def must_be_refused(ended: EndedHere) -> None:
    assert ended.code == 2
    for words in ("'second' is not finished", "prompt.template", "--restart"):
        assert words in ended.message


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_restart_is_finished_by_its_job_and_by_no_other(
    step: tuple[str, str], place: Place, first: Path, second: Path
) -> None:
    kill_restart(second, step)
    assert is_pending(place)
    for options in (RunOptions(), RunOptions(retry_failed=True), RunOptions(slice=(1, 2))):
        must_be_refused(run_here(first, options))
        assert len(result_files(place)) == STEPS[step]
    refused = run_here(second, RunOptions(slice=(1, 2)))
    assert refused.code == 2 and "once without --slice" in refused.message
    assert run_here(second).code == 0
    assert not is_pending(place)
    assert results(place).height == 20
    assert "prompt.template" in run_here(first).message


@pytest.mark.s3
def test_a_restart_killed_on_s3_is_finished_by_its_job_and_by_no_other(
    server: S3Server, tmp_path: Path
) -> None:
    bucket = Place(f"s3://{server.create_bucket()}", server.environment())
    for name in ("a", "b"):
        bucket.write_parquet(f"in/{name}.parquet", rows(10))
    first, second = write_job(tmp_path, job(bucket), "first.yaml"), write_second(bucket, tmp_path)
    assert run(first, place=bucket).code == 0
    crash = {"op": "delete", "key": r"a\.parquet$", "when": "after"}
    assert run(second, "--restart", place=bucket, crash=crash).code == -9
    must_fail(run(first, place=bucket), 2, "'second' is not finished", "prompt.template")
    assert result_files(bucket) == ["b.parquet"]
    assert run(second, place=bucket).code == 0
    assert results(bucket).height == 20


def test_every_command_says_that_a_restart_is_pending(
    place: Place, first: Path, second: Path
) -> None:
    kill_restart(second, ("put", "restart.json"))
    validated = run(first, command=("validate",))
    assert validated.code == 2 and "'second' is not finished" in validated.stderr
    status = run(place.url("out"), command=("status",))
    assert status.code == 0 and "not complete: a --restart" in status.stdout
    planned = run(second, command=("plan",))
    assert planned.code == 0 and "'second' is not finished" in planned.stdout
    ended = run(second)
    assert any("is not finished" in text for text in ended.result["warnings"])
    kill_restart(first, ("delete", "job.json"))
    status = run(place.url("out"), command=("status",))
    assert status.code == 0 and "not complete: a --restart" in status.stdout


def test_results_that_a_killed_restart_left_can_be_kept(
    place: Place, first: Path, second: Path
) -> None:
    kill_restart(second, HALFWAY)
    marker = place.url("out", MARKER)
    must_fail(run(first), 2, f"to keep the results that are left, delete {marker} and start again")
    Path(marker).unlink()
    ended = run(first)
    assert (ended.code, ended.result["rows_computed"]) == (0, 10)
    assert results(place).height == 20


def test_a_killed_restart_may_be_requested_again_by_any_job(
    place: Place, first: Path, second: Path
) -> None:
    kill_restart(second, HALFWAY)
    ended = run(first, "--restart")
    assert (ended.code, ended.result["rows_computed"]) == (0, 20)
    assert not is_pending(place)
    assert not ended.result["warnings"]


@pytest.mark.parametrize("marker", ['{"restart": true}', "", "[]", '{"digest": "x", "job": []}'])
def test_a_marker_that_does_not_say_whose_it_is_deletes_nothing(
    marker: str, place: Place, first: Path
) -> None:
    """That of version 0.1.0, or a damaged one."""
    Path(place.url("out", MARKER)).write_text(marker)
    refused = run_here(first)
    assert refused.code == 2
    for words in ("nothing says for which job", "To keep the results", "--restart"):
        assert words in refused.message
    assert len(result_files(place)) == 2
    assert run_here(first, RESTART).code == 0
    assert results(place).height == 20
    assert not is_pending(place)


FORBIDDEN = ConfigError("cannot delete it: Permission denied")


@pytest.mark.parametrize("name", ["_SUCCESS", "a.parquet"])
def test_a_restart_that_can_delete_nothing_is_taken_back(
    name: str, place: Place, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_deletes(patched, name, before=FORBIDDEN)
        refused = run_here(second, RESTART)
    assert refused.code == 2 and "Permission denied" in refused.message
    assert not is_pending(place)
    ended = run(first)
    assert (ended.code, ended.result["rows_computed"]) == (0, 0)
    assert results(place).height == 20


def test_a_restart_that_deleted_something_stays_and_says_so(
    place: Place,
    first: Path,
    second: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patched:
        fail_deletes(patched, "b.parquet", before=FORBIDDEN)
        assert run_here(second, RESTART).code == 2
        assert "start this job again to finish it" in caplog.text
        assert run_here(second).code == 2
    assert result_files(place) == ["b.parquet"]
    assert is_pending(place)
    must_be_refused(run_here(first))
    assert run_here(second).code == 0
    assert results(place).height == 20


def test_a_restart_deletes_only_what_is_named_like_a_part(
    place: Place, first: Path, second: Path
) -> None:
    mine = ["parts/c.parquet.parts/w000000-r0001-000001.part"]
    mine += ["unreadable/c.parquet.parts/w000000-r0001-000001.part"]
    foreign = ["parts/notes.txt", "parts/c.parquet.parts/notes.txt", "unreadable/why.txt"]
    for name in [*mine, *foreign]:
        file = Path(place.url("out", "_batchinfer", name))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    assert run_here(second, RESTART).code == 0
    names = set(place.names("out"))
    assert {f"_batchinfer/{name}" for name in foreign} <= names
    assert not {f"_batchinfer/{name}" for name in mine} & names


def test_a_restart_of_a_job_that_cannot_run_deletes_nothing(
    place: Place, first: Path, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    settings = job(place, model={"tokenizer": str(tokenizer)}, prompt={"template": "x {{ text }}"})
    refused = run(
        write_job(tmp_path, settings, "broken.yaml"),
        "--restart",
        environ={"FAKE_REAL_TOKENIZER": "1"},
    )
    must_fail(refused, 2, "tokenizer")
    assert len(result_files(place)) == 2
    assert json.loads(Path(place.url("out", "_SUCCESS")).read_text())["rows"] == 20


def test_a_start_beside_a_restart_that_deletes_what_it_looks_at_is_tried_again(
    place: Place, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was listed a moment ago."""
    read = ownership.read_facts

    def read_after_other(store: Store, key: str) -> dict[str, Any] | None:
        store.delete([key])
        return read(store, key)

    monkeypatch.setattr(ownership, "read_facts", read_after_other)
    ended = run_here(first, RESTART)
    assert ended.code == 75 and "changed while it was looked at" in ended.message
    monkeypatch.undo()
    assert run_here(first).code == 0
    assert results(place).height == 20
