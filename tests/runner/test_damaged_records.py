"""A damaged record costs no result: the advice is to remove it, and that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.errors import ConfigError
from batchinfer.runner import RunOptions
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, write_job

DAMAGES = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "cut": b'{\n "digest": "ab',
    "a list": b"[]",
    "without fields": b"{}",
    "other types": b'{"digest": 1, "input": {}, "ingredients": [], "run": "x", "holder": 3}',
}


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    """A job whose first start made 25 of 40 rows durable, 20 of them in a finished file."""
    for index, name in enumerate("ab"):
        folder.write_parquet(f"in/{name}.parquet", rows(20, start=20 * index))
    path = write_job(tmp_path, job(folder))
    assert run_here(path, RunOptions(limit=25)).code == 0
    return path


def status_error(folder: Place) -> BaseException | None:
    return CliRunner().invoke(cli, ["status", folder.url("out")]).exception


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["job.json", "runs/0001.json", "_SUCCESS"])
def test_a_damaged_record_is_named_and_the_results_are_used_without_it(
    folder: Place, path: Path, name: str, damage: str
) -> None:
    if is_complete := name == "_SUCCESS":
        assert run_here(path).code == 0
    before = results(folder)
    record = Path(folder.url("out", name if is_complete else f"_batchinfer/{name}"))
    record.write_bytes(DAMAGES[damage])
    for options in (RunOptions(), RunOptions(retry_failed=True)):
        refused = run_here(path, options)
        assert refused.code == 2, refused.message
        assert f"{record} is damaged" in refused.message
        assert "Remove it and start again" in refused.message
        assert "--restart" not in refused.message
    assert isinstance(status_error(folder), ConfigError | None)
    record.unlink()
    ended = run_here(path)
    assert ended.code == 0, ended.message
    after = results(folder)
    assert after["row"].to_list() == [*range(20), *range(20)]
    assert before.equals(after.filter(after["shard"].is_in(before["shard"].unique())))
    assert after.filter(after["attempt"] == 1).height >= 25, "durable rows were computed again"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_status_is_named_by_who_reads_it_and_stops_no_start(
    folder: Place, path: Path, damage: str
) -> None:
    record = Path(folder.url("out", "_batchinfer", "status", "0001.json"))
    record.parent.mkdir(exist_ok=True)
    record.write_bytes(DAMAGES[damage])
    error = status_error(folder)
    assert isinstance(error, ConfigError) and "0001.json is damaged" in str(error)
    ended = run_here(path)
    assert ended.code in (0, 2), ended.message
    record.unlink()
    assert run_here(path).code == 0
    assert results(folder).height == 40


def test_strange_names_among_the_records_are_not_run_numbers(folder: Place, path: Path) -> None:
    for folder_name in ("runs", "status", "logs"):
        strange = Path(folder.url("out", "_batchinfer", folder_name))
        strange.mkdir(exist_ok=True)
        for name in ("²", "٣.json", "notes.txt", "-1.json"):
            (strange / name).touch()
    assert run_here(path).code == 0
    assert results(folder).height == 40
