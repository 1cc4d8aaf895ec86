"""A damaged record costs no result: the advice is to remove it, and that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.errors import BatchInferError, ConfigError
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


#: One value of a record, and what was put there by hand.
VALUES: list[tuple[str, list[str | int], Any]] = [
    ("job.json", ["job", "model", "save_mode_gib"], float("nan")),
    ("job.json", ["job", "model", "path"], 1),
    ("job.json", ["job", "engine", "options"], "x"),
    ("job.json", ["job", "input", "keep_columns"], [1.5]),
    ("job.json", ["ingredients", "settings"], "x"),
    ("job.json", ["carried_schema"], [1]),
    ("runs/0001.json", ["input", 0, 0], [1]),
    ("runs/0001.json", ["input", 1, 3], "x"),
    ("runs/0001.json", ["input", 1, 3], -1),
    ("status/0001.json", ["updated_at"], "2026-13-45T99:99"),
    ("status/0001.json", ["holder"], {"host": "x"}),
    ("status/0001.json", ["rows_total"], "x"),
    ("status/0001.json", ["eta_s"], 1e300),
    ("status/0001.json", ["verdict"], {"text": {}}),
    ("status/0001.json", ["spent"], "x"),
]


@pytest.mark.parametrize(("name", "place", "value"), VALUES, ids=str)
def test_a_value_changed_by_hand_is_taken_or_named_by_every_command(
    folder: Place, path: Path, name: str, place: list[str | int], value: Any
) -> None:
    record = Path(folder.url("out", "_batchinfer", name))
    content = at = json.loads(record.read_text())
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    record.write_text(json.dumps(content))
    out = folder.url("out")
    for command in (["status", out], ["show", out], ["validate", str(path)], ["plan", str(path)]):
        ended = CliRunner().invoke(cli, command)
        known = isinstance(ended.exception, BatchInferError | None)
        assert known or ended.exit_code == 0, (command, ended.exception)
    assert run_here(path).code in (0, 2)


def test_a_status_of_another_version_is_shown_as_far_as_it_goes(folder: Place, path: Path) -> None:
    record = Path(folder.url("out", "_batchinfer", "status", "0001.json"))
    content = json.loads(record.read_text())
    for name in ("rows_total", "rows_failed", "tokens_per_s", "eta_s", "verdict", "spent"):
        content.pop(name, None)
    record.write_text(json.dumps(content | {"state": "running"}))
    shown = CliRunner().invoke(cli, ["status", folder.url("out")], catch_exceptions=False)
    assert " rows durable" in shown.stdout
