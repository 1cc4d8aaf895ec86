"""What stands in records is text: bytes that are none are the caller's to mend, not a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.comparison.spec import read_spec
from batchinfer.evaluation.settings import check_settings
from batchinfer.evaluation.texts import Text
from tests.support.jobs import MODEL, run

NO_TEXT = os.fsdecode(b"a\xffb")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("perplexity", (str(MODEL), "--label", NO_TEXT)),
        ("perplexity", (str(MODEL), f"--data={NO_TEXT}")),
        ("compare", ("spec.yaml", "--title", NO_TEXT)),
        ("compare", (NO_TEXT,)),
        ("pair", (NO_TEXT, "x")),
        ("grade", ("x", "--reference", NO_TEXT)),
    ],
)
def test_arguments_that_are_not_utf_8_are_refused(command: str, arguments: tuple[str, ...]) -> None:
    ended = run(*arguments, command=(command,))
    assert (ended.code, ended.stdout) == (2, "")
    assert "is not UTF-8 text" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("perplexity", ("",), "'MODEL'"),
        ("perplexity", (str(MODEL), "--work", ""), "'--work'"),
        ("perplexity", (str(MODEL), "--data="), "'--data'"),
        ("perplexity", (str(MODEL), "--reference", ""), "'--reference'"),
        ("compare", ("spec.yaml", "--out", ""), "'--out'"),
        ("compare", ("spec.yaml", "--filter", "a", "--filter", ""), "'--filter'"),
        ("pair", ("x", ""), "'OTHER'"),
        ("grade", ("x", "--reference", ""), "'--reference'"),
    ],
)
def test_an_empty_argument_is_not_the_current_directory(
    command: str,
    arguments: tuple[str, ...],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(cli, [command, *arguments])
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert f"Invalid value for {name}: it is empty" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_two_options_for_one_axis_are_refused(tmp_path: Path) -> None:
    for other in (("-v", "-x", "speed"), ("-x", "speed", "-v")):
        ended = CliRunner().invoke(cli, ["compare", str(tmp_path / "spec.yaml"), *other])
        assert (ended.exit_code, "not both" in ended.output) == (2, True)


@pytest.mark.parametrize(
    "changes", [{"title": "\ud800"}, {"settings": {"engine.options.x": ["\ud800"]}}]
)
def test_a_spec_with_half_a_character_is_refused(
    changes: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"entries": [{"model": str(MODEL)}]} | changes))
    with pytest.raises(ConfigError, match="is not valid text"):
        read_spec(path)


def test_a_setting_with_half_a_character_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.options\.x: the value is not valid text"):
        check_settings({"engine.options.x": "\ud800"})


def test_text_of_parquet_that_is_not_utf8_is_named_with_its_rows(tmp_path: Path) -> None:
    stored = pa.array([b"fine", b"hell\xff"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), len(stored), stored.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    text = Text("a", str(tmp_path / "a.parquet"), "text", "\n\n")
    with pytest.raises(InputError, match="rows 0 to 1: column 'text' has text that is not UTF-8"):
        list(text.pieces())
