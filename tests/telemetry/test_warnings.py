"""What a run leaves out, guesses or cuts is told once, to people and to machines."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import polars as pl
import pytest

from batchinfer.telemetry import Logs, Warnings, log_event
from batchinfer.telemetry.logs import MAX_WARNING_CHARS, MAX_WARNINGS
from tests.support.endings import changed
from tests.support.jobs import MODEL, Ended, Place, job, rows, run, write_job

logger = logging.getLogger("batchinfer.test")

#: The demo model has no fp4 on a CPU: the fallback is taken, with a warning.
FALLBACK = {"path": str(MODEL), "quantization": "fp4", "quantization_fallback": ["fp32"]}


def warned(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning  ")]


def test_a_warning_that_comes_often_is_kept_once() -> None:
    with Warnings() as warnings:
        for _ in range(3):
            logger.warning("the store is %s", "slow")
        log_event(logger, logging.WARNING, "cut", rows=3, detail={"a": 1})
        logger.info("not a warning")
        logger.error("not a warning either")
    logger.warning("too late")
    assert warnings.texts() == ["the store is slow", "cut rows=3"]


def test_control_characters_of_names_neither_act_nor_make_lines(tmp_path: Path) -> None:
    name = "in/\x1b[2Ja\rb\u202ec.parquet"
    shown = r"in/\x1b[2Ja\rb\u202ec.parquet"
    err = io.StringIO()
    logs = Logs(err)
    logs.open_file(tmp_path / "log", run=1)
    logger.warning("left out: %s", name)
    log_event(logger, logging.INFO, "shard_finished", shard=name)
    logs.close()
    assert logs.warnings.texts() == [f"left out: {shown}"]
    for text in (err.getvalue(), (tmp_path / "log").read_text()):
        assert text.count(shown) + text.count(shown.replace("\\", "\\\\")) == 2
        assert len(text.splitlines()) == 2 and text.replace("\n", "").isprintable()
    ended = run("\x1b[2Jnowhere\x07.yaml", command=("validate",))
    assert ended.code == 2 and ended.stderr.replace("\n", "").isprintable()
    assert r"\x1b[2Jnowhere\x07.yaml" in ended.stderr


def test_many_and_long_warnings_are_cut_and_the_rest_is_counted() -> None:
    told: list[str] = []
    with Warnings(told.append) as warnings:
        for index in range(1200 + MAX_WARNINGS):
            logger.warning("%d\n%s", index, "x" * 10_000)
    *kept, rest = warnings.texts()
    assert kept == told and len(kept) == MAX_WARNINGS
    assert rest == "and 1,200 more warnings"
    assert all(len(text) == MAX_WARNING_CHARS and "\n" not in text for text in kept)


def test_a_warning_from_before_the_log_file_exists_is_in_it_too(tmp_path: Path) -> None:
    logs = Logs(io.StringIO())
    logger.warning("early")
    logs.open_file(tmp_path / "0001.log", run=1)
    logger.warning("late")
    logs.close()
    lines = (tmp_path / "0001.log").read_text().splitlines()
    assert [line.split("Z ")[1] for line in lines] == [
        "batchinfer.test warning early",
        "batchinfer.test warning late",
    ]


@pytest.fixture
def with_repeated_ids(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    frame = rows(4).with_columns(id=pl.Series(["a", None, "a", "b"]))
    place.write_parquet("in/s0.parquet", frame)
    return place


def test_the_last_line_of_a_run_lists_its_warnings(
    with_repeated_ids: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(with_repeated_ids))
    ended = run(path)
    assert ended.code == 0, ended.stderr
    nulls, repeated = ended.result["warnings"]
    assert "is null in 1 of 4 rows" in nulls and "the value 'a' in several rows" in repeated
    assert nulls in ended.stderr and repeated in ended.stderr
    again = run(path)
    assert again.result["warnings"] == []


def test_a_quiet_run_that_ends_well_prints_no_warning(
    with_repeated_ids: Place, tmp_path: Path
) -> None:
    ended = run(write_job(tmp_path, job(with_repeated_ids)), "--quiet")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")


def test_reports_have_a_line_for_each_warning(with_repeated_ids: Place, tmp_path: Path) -> None:
    path = write_job(tmp_path, job(with_repeated_ids, model=FALLBACK))
    told = [warned(run(path, command=command).stdout) for command in (("validate",), ("plan",))]
    assert told[0] == told[1]
    (line,) = told[0]
    assert "fp4" in line and "fp32" in line


def test_commands_whose_stdout_is_data_warn_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from batchinfer.cli import schemas
    from batchinfer.cli.app import cli

    monkeypatch.setattr(schemas, "print_or_write", lambda write: logger.warning("look out"))
    ended = CliRunner().invoke(cli, ["schema"])
    assert (ended.stdout, ended.stderr) == ("", "warning  look out\n")


def test_a_forecast_prints_warnings_after_its_engine_is_gone(
    with_repeated_ids: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(with_repeated_ids))
    fake = {"warn": "the engine guessed"}
    ended: Ended = run(path, "--measure", "4", command=("plan",), fake=fake)
    assert ended.code == 0, ended.stderr
    assert warned(ended.stdout) == ["warning  the engine guessed"]


def test_a_filter_that_keeps_no_row_is_reported_at_each_start(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/s0.parquet", rows(20))
    path = write_job(tmp_path, changed(job(folder), input={"filter": "id = 'nobody'"}))
    (first_rows,) = warned(run(path, command=("validate",)).stdout)
    assert "keeps none of the first 20 rows of s0.parquet" in first_rows
    for what in ("20 rows", "the input's rows"):
        ended = run(path)
        assert (ended.code, ended.result["rows"]) == (0, 0)
        (warning,) = ended.result["warnings"]
        assert f"input.filter \"id = 'nobody'\" keeps none of {what}" in warning
