"""`init` asks what a job needs, checks each answer, and writes a file that `validate` accepts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from batchinfer.cli.app import cli
from batchinfer.cli.found import InputLook, find_here, look_at_input
from batchinfer.config import InputSettings, Job, load_job
from batchinfer.errors import ConfigError
from batchinfer.prompt import encode
from batchinfer.source import ShardReader
from batchinfer.testing import LightTokenizer
from tests.support.jobs import MODEL, Place, rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with an input and a model that does not chat, so its tokenizer is light."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encode, "_load", lambda path, **_: LightTokenizer(path))
    Place(str(tmp_path)).write_parquet("data/s0.parquet", rows(8))
    (tmp_path / "models" / "base").mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "models" / "base" / file.name).symlink_to(file)
    return tmp_path


def init(*arguments: str, answers: list[str] | None = None) -> Result:
    lines = "".join(f"{answer}\n" for answer in answers or ())
    return CliRunner().invoke(cli, ["init", *arguments], input=lines)


def written(name: str = "job.yaml") -> Job:
    return load_job(name, environ={}).job


def refusal(result: Result) -> str:
    assert result.exit_code != 0
    return str(result.exception) if result.exception else result.output


@pytest.mark.slow
def test_the_defaults_are_a_job_that_is_accepted(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that chats: a message with the column in it."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "models" / "base" / "chat_template.jinja").symlink_to(MODEL / "chat_template.jinja")
    ended = init("--yes")
    assert ended.exit_code == 0, ended.output
    job = written()
    assert (job.name, job.task, job.input.path) == ("job", "generate", ("data/*.parquet",))
    assert (job.input.id_column, job.model.path, job.output.path) == (
        *("id", "models/base"),
        "out/job",
    )
    assert job.prompt.messages is not None
    assert [(m.role, m.content) for m in job.prompt.messages] == [("user", "{{ text }}")]
    for shown in ("8 rows", "context 2,048 tokens, has a chat template", "int8 (made once)"):
        assert shown in ended.output
    text = Path("job.yaml").read_text()
    assert "# Copied to the output. There are: id, text." in text
    accepted = CliRunner().invoke(cli, ["validate", "job.yaml"])
    assert accepted.exit_code == 0 and "job      job.yaml: ok" in accepted.output


def test_an_answer_that_cannot_be_used_is_explained_and_asked_again(here: Path) -> None:
    answers = [
        *("nowhere", "data"),
        *("models", "models/base"),
        *("int3", "none"),
        *("translate", "generate"),
        *("txt", "text"),
        *("2048", "0", "many", "12"),
        *("nope", "-"),
        *("data", "out/a"),
    ]
    ended = init("a.yaml", answers=answers)
    assert ended.exit_code == 0, ended.output
    for sentence in (
        "input.path: nothing matches nowhere",
        "config.json is missing",
        "must be one of auto, none, fp32, fp16, bf16, int8, int4, fp8, fp4, awq, gptq, nf4,",
        "must be one of generate, score",
        "there is no column 'txt' (did you mean 'text'?); the columns are id, text",
        "sampling.max_tokens 2048 leaves no room for a prompt",
        "must be at least 1, got 0",
        'must be a whole number, got "many"',
        "there is no column 'nope'; the columns are id, text",
        "is inside output.path",
    ):
        assert sentence in ended.output, sentence
    job = written("a.yaml")
    assert (job.input.path, job.model.quantization) == (("data",), "none")
    assert (job.prompt.column, job.sampling.max_tokens) == ("text", 12)
    assert (job.input.id_column, job.output.path, job.name) == (None, "out/a", "a")


def test_nothing_that_an_option_says_is_asked(here: Path) -> None:
    """Neither what --set says; the file has both."""
    ended = init(
        *("--input", "data/s0.parquet", "--model", "models/base", "--prompt-column", "text"),
        *("--task", "generate", "--quantization", "fp32", "--max-tokens", "7"),
        *("--id-column", "id", "--set", "output.path=out/b", "--set", "sampling.top_p=0.5"),
    )
    assert ended.exit_code == 0, ended.output
    job = written()
    assert (job.model.quantization, job.sampling.max_tokens, job.sampling.top_p) == ("fp32", 7, 0.5)
    assert job.output.path == "out/b"


def test_a_text_that_is_scored_needs_no_sampling(here: Path) -> None:
    assert init("--yes", "--task", "score").exit_code == 0
    assert "sampling" not in Path("job.yaml").read_text()
    assert written().prompt.column == "text"


@pytest.mark.parametrize("arguments", [["--model", "nowhere"], ["--max-tokens", "0"]])
def test_a_bad_option_is_refused_as_a_run_would_refuse_it(here: Path, arguments: list[str]) -> None:
    """And nothing is written."""
    ended = init("--yes", *arguments)
    setting = {"--model": "model.path", "--max-tokens": "sampling.max_tokens"}[arguments[0]]
    init("--yes", "good.yaml")
    of_run = CliRunner().invoke(
        cli, ["validate", "good.yaml", "--set", f"{setting}={arguments[1]}"]
    )
    of_option, of_set = refusal(ended), refusal(of_run)
    assert of_option.removeprefix(arguments[0]) == of_set.removeprefix("--set")
    assert not Path("job.yaml").exists()


def test_stdin_that_ends_is_not_taken_for_an_answer(here: Path) -> None:
    ended = init(answers=["data"])
    assert "stdin ended before this was answered: model. --yes takes" in refusal(ended)
    assert not Path("job.yaml").exists()


def test_without_anything_here_the_defaults_are_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--yes: nothing found here determines input.path: give --input" in refusal(init("--yes"))


def test_a_file_that_exists_is_overwritten_only_if_somebody_says_so(here: Path) -> None:
    path = Path("job.yaml")
    path.write_text("mine")
    for ended in (init("--yes"), init(answers=["n"]), init(answers=[""])):
        assert "job.yaml exists, and is not overwritten" in refusal(ended)
        assert path.read_text() == "mine"
    assert init(answers=["y", *[""] * 8]).exit_code == 0
    assert written().name == "job"


def test_the_folder_of_the_file_is_made(here: Path) -> None:
    assert init("--yes", "jobs/new/a.yaml").exit_code == 0
    assert written("jobs/new/a.yaml").name == "a"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("data/s0.parquet/a.yaml", "s0.parquet is a file where a folder is needed"),
        (f"{'a' * 300}.yaml", "File name too long. Use another path"),
        ("loop/a.yaml", "loop/a.yaml"),
        ("pipe", "pipe is no regular file"),
    ],
)
def test_a_place_where_no_file_can_be_is_refused_before_a_question(
    here: Path, path: str, told: str
) -> None:
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    ended = init(path, answers=["y"])
    assert isinstance(ended.exception, ConfigError)
    assert told in refusal(ended) and "Which rows?" not in ended.output


def test_a_file_that_appears_while_questions_are_asked_is_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("job.yaml")
    monkeypatch.setattr("batchinfer.cli.guide.check_job", lambda *_: path.write_text("theirs"))
    assert "job.yaml was created in the meantime and is not overwritten" in refusal(init("--yes"))
    assert path.read_text() == "theirs"


def test_the_default_output_is_a_new_one(here: Path) -> None:
    (here / "out" / "job").mkdir(parents=True)
    assert init("--yes").exit_code == 0
    assert written().output.path == "out/job-2"


def look(folder: Path, frame: pl.DataFrame) -> InputLook:
    Place(str(folder)).write_parquet("in/x.parquet", frame)
    return look_at_input(InputSettings.model_validate({"path": str(folder / "in")}))


@pytest.mark.parametrize(
    ("column", "key"),
    [
        ([[{"role": "user", "content": "hi"}]], "messages_column"),
        (['[{"role": "user", "content": "hi"}]'], "messages_column"),
        (["hi"], "column"),
        ([[1, 2, 3]], "token_ids_column"),
    ],
)
def test_the_type_of_a_column_says_what_kind_of_prompt_it_is(
    tmp_path: Path, column: list[Any], key: str
) -> None:
    assert look(tmp_path, pl.DataFrame({"a b": column})).prompt_key("a b") == key


def test_the_likely_column_is_known_by_its_name_or_is_the_longest(tmp_path: Path) -> None:
    frame = pl.DataFrame({"short": ["a"], "Prompt": ["b"], "long": ["c" * 90], "n": [1]})
    assert look(tmp_path, frame).likely_prompt() == "Prompt"
    assert look(tmp_path, frame.drop("Prompt")).likely_prompt() == "long"
    assert look(tmp_path, frame.select("n")).likely_prompt() is None


def test_of_the_input_a_few_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []
    blocks = ShardReader.blocks
    monkeypatch.setattr(
        ShardReader, "blocks", lambda self, *rows: ranges.append(rows) or blocks(self, *rows)
    )
    found = look(tmp_path, rows(1000))
    assert ranges == [(0, 3)]
    assert [*found.lines(60)][:2] == [
        "1 file with 1,000 rows",
        "id    string  row-0 | row-1 | row-2",
    ]


def test_a_column_that_cannot_be_shown_or_read_is_left_out(tmp_path: Path) -> None:
    frame = pl.DataFrame({f"c{n}": ["x\x1b[31m\ny" * 50] for n in range(40)})
    lines = [*look(tmp_path, frame).lines(40)]
    assert len(lines) == 32 and lines[-1] == "and 10 more columns"
    assert all(len(line) <= 40 and "\x1b" not in line for line in lines)


def test_what_is_here_is_found_but_not_in_outputs_and_models(here: Path) -> None:
    """The nearest comes first, then the folder with more files."""
    place = Place(str(here))
    for name in ("out/x/s.parquet", "many/s0.parquet", "many/s1.parquet", ".hidden/s.parquet"):
        place.write_parquet(name, rows(1))
    (here / "out" / "x" / "_batchinfer").mkdir()
    (here / "models" / "base" / "s.parquet").touch()
    for part in ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf"):
        (here / "many" / part).touch()
    found = find_here()
    assert found.inputs == ["many/*.parquet", "data/*.parquet"]
    assert found.models == ["many/x-00001-of-00002.gguf", "models/base"]
