"""`show` of outputs whose kept columns hold what Python or JSON cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.errors import ConfigError
from batchinfer.sink import output_columns
from batchinfer.tasks.generate import COLUMNS


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """One result that kept a column of each kind."""
    text = pa.array([b"\xff\xfe"], pa.binary())
    kept = {
        "id": pa.Array.from_buffers(pa.string(), 1, text.buffers()),
        "raw": text,
        "far": pa.array([2**62], pa.timestamp("us", "Europe/Berlin")),
        "endless": pa.array([float("-inf")]),
        "deep": pa.array([[{"when": 2**62}]], pa.list_(pa.struct([("when", pa.timestamp("us"))]))),
    }
    columns = {
        name: pa.nulls(1, data_type) for name, (data_type, _) in output_columns(COLUMNS).items()
    }
    columns |= {"shard": pa.array(["a.parquet"]), "row": pa.array([0]), "sample": pa.array([0])}
    columns |= {"completion": pa.array(["hello"]), "finish_reason": pa.array(["stop"])}
    pq.write_table(pa.table(kept | columns), tmp_path / "a.parquet")
    record = tmp_path / "_batchinfer" / "job.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"name": "test", "job": {}}))
    return tmp_path


def test_values_that_no_text_can_say_are_shown_as_the_reason_why(output: Path) -> None:
    shown = CliRunner().invoke(cli, ["show", str(output), "--json"], catch_exceptions=False)
    row = json.loads(shown.stdout, parse_constant=pytest.fail)
    assert row["completion"] == "hello"
    assert row["endless"] is None
    for name in ("id", "raw", "far", "deep"):
        assert row[name].startswith("("), row[name]


def test_the_short_form_shows_the_reason_as_the_id(output: Path) -> None:
    shown = CliRunner().invoke(cli, ["show", str(output)], catch_exceptions=False)
    assert "not valid UTF-8" in shown.stdout
    assert "hello" in shown.stdout


@pytest.mark.parametrize("content", ["garbage", "torn", "foreign"])
def test_a_file_that_holds_no_results_is_named(output: Path, content: str) -> None:
    path = output / "a.parquet"
    if content == "foreign":
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        path.write_bytes(b"garbage" if content == "garbage" else path.read_bytes()[:-20])
    shown = CliRunner().invoke(cli, ["show", str(output)])
    assert isinstance(shown.exception, ConfigError)
    assert str(path) in str(shown.exception) and "Move it away" in str(shown.exception)


@pytest.mark.parametrize("command", ["show", "status", "grade"])
@pytest.mark.parametrize(
    "record",
    [[], {"name": "test"}, {"job": 1}, {"job": {"task": ["score"]}}, {"job": {"input": [1]}}],
    ids=json.dumps,
)
def test_a_record_of_the_job_that_batchinfer_did_not_write_is_named(
    output: Path, command: str, record: Any
) -> None:
    path = output / "_batchinfer" / "job.json"
    path.write_text(json.dumps(record))
    more = ["--reference", "id"] if command == "grade" else []
    ended = CliRunner().invoke(cli, [command, str(output), *more])
    assert isinstance(ended.exception, ConfigError), ended.exception
    assert f"{path} is damaged" in str(ended.exception)
