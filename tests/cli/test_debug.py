"""--debug shows what is otherwise kept in the log or not said; --env-file sets variables."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.cli.env_file import read_env_file
from batchinfer.errors import ConfigError
from batchinfer.telemetry.stdio import _Follower
from tests.support.jobs import Place, job, rows, run, write_job

VARIABLE = "BATCHINFER__SAMPLING__MAX_TOKENS"


@pytest.fixture(autouse=True)
def _variables_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets in this process is undone."""
    for name in ("BATCHINFER_DEBUG", VARIABLE, "SECRET"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    folder.write_parquet("in/s0.parquet", rows(3))
    return write_job(tmp_path, job(folder))


def explained(*arguments: str) -> list[str]:
    """Key, value and origin of sampling.max_tokens."""
    lines = CliRunner().invoke(cli, arguments).output.splitlines()
    return next(line for line in lines if line.startswith("sampling.max_tokens")).split()


def env_file(folder: Path, text: str) -> str:
    path = folder / "settings.env"
    path.write_text(text)
    return str(path)


def test_a_run_shows_log_prompts_and_versions(path: Path, folder: Place) -> None:
    """They are in the log as well, and stdout still has one line."""
    ended = run(path, "--debug", fake={"warn": "odd engine"})
    assert ended.code == 0 and len(ended.stdout.splitlines()) == 1
    log = Path(folder.url("out", "_batchinfer", "logs", "0001.log")).read_text()
    for text in (ended.stderr, log):
        assert "batchinfer.fake warning odd engine" in text
        assert "prompt of s0.parquet:0, 3 tokens: '0 word '" in text
        assert "request 0: s0.parquet:0, sample 0, 3 prompt tokens, seed None" in text
        assert "shard finished" in text
    assert "debug packages: torch" in ended.stderr
    assert ended.stderr.count("engine_ready") == 1


def test_a_run_without_it_shows_none_of_that(path: Path, folder: Place) -> None:
    ended = run(path, environ={"BATCHINFER_DEBUG": "0"})
    log = Path(folder.url("out", "_batchinfer", "logs", "0001.log")).read_text()
    assert ended.code == 0
    assert "word" not in ended.stderr + log and "packages" not in ended.stderr + log


def test_a_variable_asks_for_it_too_and_json_lines_stay_json(path: Path) -> None:
    """Also where the engine fails, whose traceback is shown, and --quiet does not hide it."""
    ended = run(
        path,
        *("--log-format", "json", "--quiet"),
        fake={"fail_build": "no such layer"},
        environ={"BATCHINFER_DEBUG": "1"},
    )
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    raised = [line["exception"] for line in lines if "exception" in line]
    assert ended.code == 2
    assert "in build" in raised[-1] and "ConfigError: no such layer" in raised[-1]
    assert any(line["event"].startswith("prompt of s0.parquet:0") for line in lines)


def test_other_commands_show_tracebacks_and_first_prompts(path: Path) -> None:
    shown = run(path, "--debug", command=("validate",))
    assert shown.code == 0 and "prompt of s0.parquet:2" in shown.stderr
    assert "prompt of" not in shown.stdout
    failed = run(path, "--debug", "--set", "model.path=nowhere", command=("validate",))
    assert failed.code == 2
    assert "Traceback" in failed.stderr and "in resolve_folder" in failed.stderr
    assert "Traceback" not in run("nowhere.yaml", command=("validate",)).stderr


def test_what_is_appended_to_a_followed_log_is_copied(tmp_path: Path) -> None:
    """Only what came after the start, and all of it at the end."""
    path = tmp_path / "log"
    path.write_text("before\n")
    read_fd, write_fd = os.pipe()
    follower = _Follower(path, write_fd)
    with path.open("a") as log:
        log.write("first\n")
        log.flush()
        assert os.read(read_fd, 100) == b"first\n"  # while it is open
        time.sleep(0.3)  # it looks again
        log.write("second\n")
        log.flush()
        assert os.read(read_fd, 100) == b"second\n"
        log.write("last\n")
    follower.close()
    os.close(write_fd)
    assert os.read(read_fd, 100) == b"last\n"


def test_a_reader_that_does_not_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchinfer.telemetry.stdio._FOLLOW_END_S", 0.05)
    path = tmp_path / "log"
    path.touch()
    follower = _Follower(path, os.pipe()[1])
    path.write_bytes(bytes(1 << 20))  # more than a pipe holds
    begun_s = time.monotonic()
    follower.close()
    assert time.monotonic() - begun_s < 5


def test_a_file_sets_variables_that_are_not_set(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option stands before or after the command; the environment wins over the file."""
    file = env_file(tmp_path, f"# a comment\nexport {VARIABLE}='12'\n")
    after = explained("explain", str(path), "--env-file", file)
    assert after == ["sampling.max_tokens", "12", VARIABLE]
    monkeypatch.setenv(VARIABLE, "13")
    before = explained("--env-file", file, "explain", str(path))
    assert before == ["sampling.max_tokens", "13", VARIABLE]


def test_values_are_taken_as_they_are_written(tmp_path: Path) -> None:
    text = "A=1 # comment\nB=\"x\\ny\"\nC='$HOME #'\nD=\nE=a=b\n\nexport F=$A"
    assert read_env_file(env_file(tmp_path, text)) == {
        "A": "1",
        "B": "x\ny",
        "C": "$HOME #",
        "D": "",
        "E": "a=b",
        "F": "$A",
    }


def test_every_line_that_sets_nothing_is_named_and_no_value(tmp_path: Path) -> None:
    file = env_file(tmp_path, "A=hunter2\n\nSECRET\n hunter2 x\nA=hunter2\n=hunter2\n")
    with pytest.raises(ConfigError) as caught:
        read_env_file(file)
    assert str(caught.value).splitlines() == [
        f"{file}:3: must look like NAME=VALUE",
        f"{file}:4: must look like NAME=VALUE",
        f"{file}:5: A: given twice, first in line 1",
        f"{file}:6: must look like NAME=VALUE",
    ]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Of a run it is the last line, too."""
    file = tmp_path / "x.env"
    ended = run("job.yaml", "--env-file", str(file))
    assert ended.code == ended.result["exit_code"] == 2
    sentence = f"--env-file {file}: cannot read the file: No such file or directory"
    assert ended.result["message"] == sentence
    file.write_bytes(b"\xff=1")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_env_file(str(file))
