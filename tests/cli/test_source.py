"""A job without a file: options say it, in every command that takes a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from batchinfer.cli.app import cli
from batchinfer.config import load_job
from batchinfer.prompt import encode
from batchinfer.testing import LightTokenizer
from tests.support.jobs import MODEL, Place, job, results, rows, run, stable, write_job

COMMANDS = ("validate", "explain", "plan")


@pytest.fixture(autouse=True)
def _light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_load", lambda path, **_: LightTokenizer(path))


@pytest.fixture
def options(folder: Place) -> list[str]:
    """Those that say what a job cannot do without."""
    folder.write_parquet("in/s0.parquet", rows(3))
    folder.write_parquet("in/s1.parquet", rows(2, start=3))
    return [
        *("--input", folder.url("in", "*.parquet"), "--model", str(MODEL)),
        *("--prompt-column", "text", "--output", folder.url("out")),
    ]


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def explained(*arguments: Any) -> dict[str, list[str]]:
    """Key -> value and origin, as `explain` prints them of a job file."""
    lines = invoke("explain", *arguments).output.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines if "." in line}


def test_explain_writes_the_file_that_says_the_same(options: list[str], tmp_path: Path) -> None:
    """Each command says the same of both, and the job is named after its output."""
    options += ["--set", "sampling.max_tokens=7", "--set", "output.path=" + str(tmp_path / "a b")]
    path = tmp_path / "job.yaml"
    path.write_text(invoke("explain", *options).output)
    assert load_job(path).job.name == "a-b"
    for command in ("validate", "plan"):
        of_options, of_file = invoke(command, *options), invoke(command, path)
        assert of_options.exit_code == of_file.exit_code == 0
        said = of_options.output.replace("the job of these options", str(path))
        assert without_memory(said) == without_memory(of_file.output)


def without_memory(output: str) -> list[str]:
    """Lines but those on what is free, which is another amount a moment later."""
    return [line for line in output.splitlines() if not line.startswith("memory")]


def test_a_run_of_options_computes_what_that_of_a_file_does(
    options: list[str], folder: Place, tmp_path: Path
) -> None:
    ended = run(*options, "--set", "sampling.max_tokens=16", "--set", "sampling.logprobs=1")
    assert ended.code == 0 and ended.result["rows"] == 5
    settings = job(folder, "by_file", input={"id_column": None})
    assert run(write_job(tmp_path, settings)).code == 0
    assert stable(results(folder)).equals(stable(results(folder, "by_file")))


def test_options_override_a_file_and_set_overrides_them(
    options: list[str], folder: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(folder))
    found = explained(path, "--output", "a", "--input", "x", "--input", "y")
    assert found["output.path"] == ['"a"', "--output"]
    assert found["input.path"] == ['["x",', '"y"]', "--input"]
    found = explained(path, "--output", "a", "--set", "output.path=b")
    assert found["output.path"] == ['"b"', "--set"]


def test_a_message_is_what_the_user_says(options: list[str], tmp_path: Path) -> None:
    """And what looks like a number or a list is the text that was given."""
    at = options.index("--prompt-column")
    options[at : at + 2] = ["--message", "[1]", "--set", "prompt.on_too_long=truncate_left"]
    path = tmp_path / "job.yaml"
    path.write_text(invoke("explain", *options).output)
    prompt = load_job(path).job.prompt
    assert prompt.messages is not None
    assert [(m.role, m.content) for m in prompt.messages] == [("user", "[1]")]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_file_and_options_the_usage_says_both(command: str) -> None:
    ended = invoke(command)
    assert ended.exit_code == 2
    assert "Missing argument 'JOB'. Without a job file, give --input, --model," in ended.output


def test_try_asks_for_what_it_needs_alone() -> None:
    for arguments in (["try"], ["try", "--model", str(MODEL)]):
        ended = invoke(*arguments)
        assert "give --model and --prompt TEXT, or" in ended.output + str(ended.exception)


def test_what_the_options_leave_out_is_named_with_the_options() -> None:
    """A run says it in its last line, too."""
    ended = run("--model", "m", "--output", "out")
    assert ended.code == 2
    assert ended.result["message"].splitlines()[:2] == [
        "command line: input: is missing",
        "command line: prompt: is missing",
    ]
    assert "give --input, --model, --output and either --prompt-column or" in ended.stderr


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--output", "a*", "--output: output.path: must be one folder, not a pattern"),
        ("--model", "s3://b/m", "--model: model.path: must be a folder or a hub name"),
        ("--input", "", "--input: input.path: must not be empty"),
        ("--message", "{{ text }}", "needs exactly one of column, template, messages"),
    ],
)
def test_a_bad_value_is_refused_with_its_option(
    options: list[str], option: str, value: str, sentence: str
) -> None:
    if option in options:
        at = options.index(option)
        del options[at : at + 2]
    ended = invoke("validate", *options, option, value)
    assert sentence in str(ended.exception)


def test_a_gguf_model_without_a_job_file_gets_the_engine_that_runs_it(tmp_path: Path) -> None:
    """Unless another is named; a folder with one such file means it too."""
    file = tmp_path / "m" / "x.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + bytes(20))
    rest = ("--input", "in", "--prompt-column", "text", "--output", "out")
    for model in (file, file.parent):
        text = invoke("explain", "--model", model, *rest).output
        assert "engine:\n  name: llama_cpp\n" in text
        text = invoke("explain", "--model", model, *rest, "--set", "engine.name=vllm").output
        assert "engine:\n  name: vllm\n" in text
    assert "engine" not in invoke("explain", "--model", MODEL, *rest).output
    assert "engine" not in invoke("explain", "--model", "org/name", *rest).output
