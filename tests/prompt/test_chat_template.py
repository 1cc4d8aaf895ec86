"""Chat templates of tokenizers, answers that go on, and what `validate` sees in the first rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batchinfer.errors import ConfigError
from tests.support.jobs import Place, job, run, write_job
from tests.support.prompts import (
    AFTER,
    BEFORE,
    MODEL,
    chat,
    kinds_of,
    prompter,
    rows_of,
    table,
    texts_of,
)

REAL_TOKENIZER = {"FAKE_REAL_TOKENIZER": "1"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The demo model without a chat template."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    return folder


def talk(*turns: tuple[str, str]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in turns])


# Where a template comes from


def test_of_several_templates_the_default_one_or_a_named_one_is_taken(
    bare: Path, tokenizer: Any
) -> None:
    templates = bare / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("T{{ messages[0].content }}{{ tools | length }}")
    (templates / "plain.jinja").write_text("P{{ messages[0].content }}")
    with pytest.raises(ConfigError, match=r"several chat templates and no default: .*plain"):
        prompter(path=str(bare), **chat())
    made = prompter(path=str(bare), **chat(chat_template="plain"))
    assert texts_of(made.prepare(table("x")), tokenizer) == ["Px"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    made = prompter(path=str(bare), **chat(chat_template_kwargs={"tools": tools}))
    assert texts_of(made.prepare(table("x")), tokenizer) == ["Tx1"]
    (bare / "chat_template.jinja").write_text("D{{ messages[0].content }}")
    assert texts_of(prompter(path=str(bare), **chat()).prepare(table("x")), tokenizer) == ["Dx"]


def test_a_template_in_the_file_of_a_processor_is_found(bare: Path, tokenizer: Any) -> None:
    (bare / "chat_template.json").write_text('{"chat_template": "J{{ messages[0].content }}"}')
    assert texts_of(prompter(path=str(bare), **chat()).prepare(table("x")), tokenizer) == ["Jx"]


def test_an_argument_that_the_template_does_not_read_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = "{% if enable_thinking %}T{% endif %}{{ messages[0].content }}"
    arguments = {"enable_thinkin": True}
    prompter(**chat(chat_template=template, chat_template_kwargs=arguments))
    assert "does not read 'enable_thinkin' (did you mean 'enable_thinking'?)" in caplog.text
    caplog.clear()
    prompter(**chat(chat_template=template, chat_template_kwargs={"enable_thinking": True}))
    assert caplog.text == ""


# Answers that go on


def test_an_answer_continues_the_last_message(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "{{ text }}"},
        {"role": "assistant", "content": "Answer: "},
    ]
    made = prompter(messages=messages, continue_final_message=True)
    (text,) = texts_of(made.prepare(table("why?")), tokenizer)
    assert text == BEFORE + "why?" + AFTER + "Answer: "
    closed = prompter(messages=messages)
    (text,) = texts_of(closed.prepare(table("why?")), tokenizer)
    assert text == BEFORE + "why?" + AFTER + "Answer: " + AFTER


def test_conversations_of_a_column_are_continued_or_are_errors(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = table(
        talk(("user", "why?"), ("assistant", "Be")),
        talk(("user", "why?")),
        talk(("user", "word " * 500), ("assistant", "Be")),
    )
    settings = {"messages_column": "text", "on_too_long": "truncate_right", "max_model_len": 100}
    prepared = prompter(**settings, continue_final_message=True).prepare(rows)
    assert kinds_of(prepared) == {1: "invalid_prompt"}
    first, _, cut = texts_of(prepared, tokenizer)
    assert first == BEFORE + "why?" + AFTER + "Be"
    assert cut.startswith(BEFORE + "word word") and cut.endswith("word" + AFTER + "Be")
    assert prepared.remarks == {} and caplog.text == ""
    assert set(prompter(**settings).prepare(rows).remarks) == {("last_is_assistant", "")}


def test_continued_prompts_are_those_of_transformers(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": " Because "}]
    made = prompter(messages_column="text", continue_final_message=True)
    expected = tokenizer.apply_chat_template(
        messages, continue_final_message=True, return_dict=False
    )
    assert rows_of(made.prepare(table(json.dumps(messages)))) == [expected]


# Before the model loads


def test_validate_refuses_what_the_chat_template_refuses(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    place.write_parquet("in/a.parquet", pl.DataFrame({"id": ["a"], "text": ["x"]}))
    template = "{{ messages[0].content }}{{ raise_exception('no users') }}"
    settings = job(place, prompt=chat(chat_template=template))
    path = write_job(tmp_path, settings)
    for command in ("validate", "run"):
        ended = run(path, place=place, command=(command,), environ=REAL_TOKENIZER)
        assert ended.code == 2 and "no users" in ended.stderr


def test_validate_says_what_the_first_rows_become(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    talks = [talk(("human", "hi"), ("assistant", "yes")), '[{"from": "human", "value": "hi"}]'] * 99
    frame = pl.DataFrame({"id": range(len(talks)), "m": talks})
    place.write_parquet("in/a.parquet", frame)
    settings = job(place, prompt={"messages_column": "m"})
    path = write_job(tmp_path, settings)
    ended = run(path, place=place, command=("validate",), environ=REAL_TOKENIZER)
    assert ended.code == 0
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning  ")]
    assert len(warnings) == 3
    assert "the role 'human'" in warnings[0] and "in 32 of 64 rows" in warnings[0]
    assert "the last message is the assistant's" in warnings[1]
    assert "32 of the first 64 rows would be errors, the first a.parquet:1" in warnings[2]
    assert "message 0 has from, value" in warnings[2]
    assert not (tmp_path / "out").exists()
