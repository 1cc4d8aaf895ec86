"""Conversations of a column: their shapes, tool calls, roles, and what is refused by the type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from batchinfer.errors import ConfigError, InputError, RowError
from batchinfer.prompt import check_type
from batchinfer.prompt.messages import parse_messages
from batchinfer.runner.remarks import RemarkWarnings
from tests.support.jobs import Place, job, results, run, write_job
from tests.support.prompts import (
    AFTER,
    BEFORE,
    chat,
    kinds_of,
    prompt_of,
    prompter,
    rows_of,
    table,
    texts_of,
)

WITH_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
)
MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from tests.support.prompts import MODEL

    return AutoTokenizer.from_pretrained(MODEL)


def column(values: list[Any], data_type: pa.DataType | None = None) -> pa.Table:
    return pa.table({"m": pa.array(values, data_type)})


def test_messages_come_as_structs_or_json(tokenizer: Any) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    made = prompter(messages_column="talk")
    structs = made.prepare(pa.table({"talk": [talk]}))
    texts = made.prepare(pa.table({"talk": [json.dumps(talk)]}))
    assert rows_of(structs) == rows_of(texts)
    expected = "<|im_start|>system\ns<|im_end|>\n" + BEFORE + "u" + AFTER
    assert texts_of(structs, tokenizer) == [expected]


@pytest.mark.parametrize(
    "value",
    [
        "no json",
        "[]",
        "{}",
        '["x"]',
        '[{"role": "user"}]',
        '[{"role": "", "content": "x"}]',
        '[{"role": "user", "content": [7]}]',
        '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]',
        '[{"role": "user", "content": [{"type": "text"}]}]',
        '[{"role": "assistant", "content": null}]',
        '[{"role": "assistant", "tool_calls": "no json"}]',
        '[{"role": "assistant", "content": null, "tool_calls": ["f"]}]',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '[{"role": "user", "content": "\\ud800"}]',
        "[" * 100_000,
    ],
)
def test_messages_that_are_none_are_errors_of_their_row(value: str) -> None:
    good = '[{"role": "user", "content": "x"}]'
    prepared = prompter(messages_column="text").prepare(table(good, value, good))
    assert kinds_of(prepared) == {1: "invalid_prompt"}


def test_a_chat_template_that_refuses_a_conversation_refuses_one_row() -> None:
    template = (
        "{{ messages[0]['content'] }}"
        "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    )
    made = prompter(messages_column="text", chat_template=template)
    one = {"role": "user", "content": "x"}
    prepared = made.prepare(table(json.dumps([one]), json.dumps([one, one])))
    assert kinds_of(prepared) == {1: "template_error"}
    assert "one only" in prepared.errors[1].message


def test_chat_template_arguments_reach_the_template(tokenizer: Any) -> None:
    template = "{{ greeting }} {{ eos_token }} {{ messages[0].content }}"
    made = prompter(**chat(chat_template=template, chat_template_kwargs={"greeting": "Hi"}))
    assert texts_of(made.prepare(table("you")), tokenizer) == ["Hi <|im_end|> you"]


def test_the_error_of_a_row_names_the_keys_that_are_there() -> None:
    made = prompter(messages_column="text")
    sharegpt = json.dumps([{"from": "human", "value": "hi"}])
    request = json.dumps({"messages": [{"role": "user", "content": "hi"}], "tools": []})
    prepared = made.prepare(table(sharegpt, request))
    assert "message 0 has from, value; it needs role and content" in prepared.errors[0].message
    assert "an object with the keys messages, tools" in prepared.errors[1].message


# Contents in parts


def test_text_parts_are_joined_with_newlines(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    talk = [{"role": "user", "content": parts}]
    made = prompter(messages_column="m")
    plain = [{"role": "user", "content": "hello\nthere"}]
    expected = rows_of(made.prepare(column([json.dumps(plain)])))
    assert rows_of(made.prepare(column([talk]))) == expected
    assert rows_of(made.prepare(column([json.dumps(talk)]))) == expected
    texts = [{"role": "user", "content": ["hello", "there"]}]
    assert rows_of(made.prepare(column([texts]))) == expected


def test_parts_that_are_not_text_are_an_error_of_their_row() -> None:
    image = {"type": "image_url", "text": None, "image_url": {"url": "x"}}
    words = {"type": "text", "text": "hello", "image_url": None}
    talks = [[{"role": "user", "content": [words, image]}], [{"role": "user", "content": [words]}]]
    prepared = prompter(messages_column="m").prepare(column(talks))
    assert kinds_of(prepared) == {0: "invalid_prompt"}
    assert "part 1 of the content is of type 'image_url'" in prepared.errors[0].message


def test_a_template_that_reads_only_parts_gets_them(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    made = prompter(**chat("say {{ text }}", chat_template=template))
    assert texts_of(made.prepare(table("hello")), tokenizer) == ["user:say hello"]


# Tool calls


def test_a_turn_of_tool_calls_without_content_is_rendered(tokenizer: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    talk = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]
    made = prompter(messages_column="m", chat_template=WITH_CALLS)
    (text,) = texts_of(made.prepare(column([json.dumps(talk)])), tokenizer)
    assert "None" not in text
    assert '<|im_start|>assistant\n[{"id": "1", "type": "function"' in text
    assert '"arguments": {"x": 1}' in text  # a mapping, as chat templates expect it
    del talk[1]["content"]
    assert texts_of(made.prepare(column([json.dumps(talk)])), tokenizer) == [text]


def test_structs_and_json_text_of_one_conversation_are_one_prompt() -> None:
    """Arrow's struct type adds a null for each key that another row has, at any depth."""

    def talk(**arguments: Any) -> list[dict[str, Any]]:
        call = {"name": "f", "arguments": arguments}
        return [
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "5"},
        ]

    talks = [talk(a=1, deep={"a": [1, None]}), talk(b=2, deep={"b": [{"c": 3}, {"d": 4}]})]
    made = prompter(messages_column="m", chat_template=WITH_CALLS)
    number, numbers = pa.int64(), pa.list_(pa.int64())
    deep = pa.struct({"a": numbers, "b": pa.list_(pa.struct({"c": number, "d": number}))})
    arguments = pa.struct({"a": number, "b": number, "deep": deep})
    call = pa.struct({"name": pa.string(), "arguments": arguments})
    fields = {"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)}
    structs = made.prepare(column(talks, pa.list_(pa.struct(fields))))
    assert rows_of(structs) == rows_of(made.prepare(column([json.dumps(t) for t in talks])))
    assert structs.errors == {}


def test_a_null_that_a_json_text_says_stays(tokenizer: Any) -> None:
    for arguments in ({"x": None}, '{"x": null}'):
        call = {"function": {"name": "f", "arguments": arguments}}
        talk = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        made = prompter(messages_column="m", chat_template=WITH_CALLS)
        (text,) = texts_of(made.prepare(column([json.dumps(talk)])), tokenizer)
        assert '"arguments": {"x": null}' in text


def test_arguments_that_are_not_a_json_object_stay_as_they_are(tokenizer: Any) -> None:
    call = {"function": {"name": "f", "arguments": "x = 1"}}
    talk = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    made = prompter(messages_column="m", chat_template=WITH_CALLS)
    (text,) = texts_of(made.prepare(column([json.dumps(talk)])), tokenizer)
    assert '"arguments": "x = 1"' in text


def test_tool_calls_may_be_json_text_in_a_struct(tokenizer: Any) -> None:
    calls = json.dumps([{"name": "f", "arguments": {"x": None}}])
    talk = [{"role": "assistant", "content": None, "tool_calls": calls}]
    made = prompter(messages_column="m", chat_template=WITH_CALLS)
    (text,) = texts_of(made.prepare(column([talk])), tokenizer)
    assert '[{"name": "f", "arguments": {"x": null}}]' in text


def test_messages_may_be_maps(tokenizer: Any) -> None:
    talk = [[("role", "user"), ("content", "hi")]]
    made = prompter(messages_column="m")
    prepared = made.prepare(column([talk], pa.list_(pa.map_(pa.string(), pa.string()))))
    assert texts_of(prepared, tokenizer) == [BEFORE + "hi" + AFTER]


def test_bytes_in_another_key_concern_the_rows_that_have_some(tokenizer: Any) -> None:
    """As those who share conversations about pictures store them, whether or not there is one."""
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "image": pa.binary()}))
    talks = [[{"role": "user", "content": "hi", "image": image}] for image in (None, b"\xff")]
    prepared = prompter(messages_column="m").prepare(column(talks, kind))
    assert texts_of(prepared, tokenizer)[0] == BEFORE + "hi" + AFTER
    assert [error.kind for error in prepared.errors.values()] == ["invalid_prompt"]


# Refused by the type


@pytest.mark.parametrize(
    ("data_type", "sentence"),
    [
        (pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})), "keys from, value"),
        (pa.list_(pa.struct({"role": pa.string(), "text": pa.string()})), "keys role, text"),
        (pa.list_(pa.struct({"role": pa.int8(), "content": pa.string()})), "role is int8"),
        (pa.list_(pa.struct({"role": pa.string(), "content": pa.int64()})), "content is int64"),
        (pa.list_(pa.struct({"role": pa.string(), "content": MESSAGE})), "content is struct"),
        (
            pa.list_(
                pa.struct(
                    {"role": pa.string(), "content": pa.list_(pa.struct({"image": pa.binary()}))}
                )
            ),
            "parts with the keys image",
        ),
        (pa.list_(pa.map_(pa.string(), pa.binary())), "values are binary, not text"),
        (pa.list_(pa.map_(pa.string(), pa.int64())), "values are int64, not text"),
        (pa.list_(pa.string()), "is list"),
        (pa.binary(), "is binary, not a list of messages"),
        (pa.struct({"messages": pa.list_(MESSAGE)}), "in its field messages"),
        (
            pa.struct({"id": pa.string(), "body": pa.struct({"messages": pa.list_(MESSAGE)})}),
            "in its field body.messages",
        ),
        (
            pa.struct({"role": pa.list_(pa.string()), "content": pa.list_(pa.string())}),
            "is a struct with the keys role, content",
        ),
    ],
)
def test_a_type_that_holds_no_conversation_is_refused(
    data_type: pa.DataType, sentence: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_type(prompt_of(messages_column="m"), pa.schema({"m": data_type}))
    assert "prompt.messages_column: column 'm'" in str(caught.value)
    assert sentence in str(caught.value)


def test_validate_refuses_messages_of_another_program_by_their_type(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    talk = [{"from": "human", "value": "hi"}]
    place.write_parquet("in/a.parquet", pl.DataFrame({"id": ["a"], "m": [talk]}))
    settings = job(place, prompt={"messages_column": "m"})
    path = write_job(tmp_path, settings)
    for command in ("validate", "run"):
        ended = run(path, place=place, command=(command,))
        assert ended.code == 2
        assert "keys from, value; they need role and content" in ended.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"role": "user", "content": "a", "role": "system"}]', "has the key 'role' twice"),
        (
            '[{"role": "user", "content": "a", "n": {"a": 1, "b": 2, "b": 3}}]',
            "has the key 'b' twice",
        ),
        (f'[{{"role": "user", "content": "a", "n": {"1" * 5000}}}]', "too many digits"),
    ],
)
def test_json_that_python_would_take_in_a_way_of_its_own_is_an_error(
    text: str, sentence: str
) -> None:
    with pytest.raises(RowError, match=sentence) as caught:
        parse_messages(text)
    assert "sys." not in caught.value.message


# What is odd and no error is said once


def remarks_of(prepared: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind, about in prepared.remarks:
        found.setdefault(kind, []).append(about)
    return found


def talk_of(*roles: str) -> str:
    return json.dumps([{"role": role, "content": f"by {role}"} for role in roles])


def test_roles_of_other_programs_are_remarked() -> None:
    made = prompter(messages_column="m")
    rows = column([talk_of("system", "user"), talk_of("human"), talk_of("User"), talk_of("human")])
    prepared = made.prepare(rows)
    assert prepared.remarks == {
        ("unknown_role", "'human'"): [1, 3],
        ("unknown_role", "'User'"): [2],
    }
    named = (
        "{% for m in messages %}{% if m.role == 'human' %}{% endif %}{{ m.content }}{% endfor %}"
    )
    prepared = prompter(messages_column="m", chat_template=named).prepare(rows)
    assert remarks_of(prepared) == {"unknown_role": ["'User'"]}


def test_messages_that_the_template_leaves_out_are_remarked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}
    rows = column([talk_of("system", "user"), json.dumps([call, {"role": "user", "content": "x"}])])
    prepared = prompter(messages_column="m", chat_template=template).prepare(rows)
    assert remarks_of(prepared) == {"left_out": ["messages of the role 'system'", "tool_calls"]}
    messages = [{"role": role, "content": "{{ text }}"} for role in ("system", "user")]
    prompter(messages=messages, chat_template=template)
    assert "leaves messages of the role 'system' out of the prompt" in caplog.text


def test_a_template_that_omits_the_messages_makes_no_prompt() -> None:
    """Every row would have the same one."""
    template = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}Answer:"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "{{ text }}"}]
    with pytest.raises(ConfigError, match=r"leaves out every message that reads a column"):
        prompter(messages=messages, chat_template=template)
    prompter(messages=[{"role": "system", "content": "{{ text }}"}], chat_template=template)
    made = prompter(messages_column="m", chat_template=template)
    prepared = made.prepare(column([talk_of("system", "user"), talk_of("system")]))
    assert kinds_of(prepared) == {0: "invalid_prompt"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content | upper }}",
        "{% for m in messages %}{{ m.content[:4] }}{% endfor %}",
        "{% if messages | length < 2 %}{{ raise_exception('more') }}{% endif %}{{ messages }}",
        "{% for m in messages %}{{ m.role }}{{ m.content if loop.last }}{% endfor %}",
    ],
)
def test_a_template_that_writes_some_of_the_messages_makes_prompts(template: str) -> None:
    made = prompter(messages_column="m", chat_template=template)
    assert not made.prepare(column([talk_of("user", "assistant", "user")])).errors
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "{{ text }}"}]
    prompter(messages=messages, chat_template=template)


def test_an_answer_at_the_end_is_remarked(caplog: pytest.LogCaptureFixture) -> None:
    prepared = prompter(messages_column="m").prepare(column([talk_of("user", "assistant")]))
    assert remarks_of(prepared) == {"last_is_assistant": [""]}
    messages = [{"role": role, "content": "{{ text }}"} for role in ("user", "assistant")]
    prompter(messages=messages)
    assert "the last message is the assistant's" in caplog.text


def test_a_remark_is_reported_once_with_rows_and_place(caplog: pytest.LogCaptureFixture) -> None:
    warnings = RemarkWarnings()
    rows = np.array([10, 11, 15])
    remarks = {("unknown_role", f"'{i}'"): [1, 2] for i in range(7)}
    warnings.check("a.parquet", rows, remarks)
    warnings.check("b.parquet", rows, {("unknown_role", "'x'"): [0]})
    (record,) = caplog.records
    assert "the role '0', '1', '2', '3', '4' and 2 more, neither a common one" in record.message
    assert "(in 2 of 3 rows read together, first a.parquet:11)" in record.message


def test_a_run_says_once_what_is_odd_about_its_conversations(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    talks = [talk_of(role) for role in ("human", "User", "gpt")] * 40
    frame = pl.DataFrame({"id": [str(i) for i in range(120)], "m": talks})
    place.write_parquet("in/a.parquet", frame)
    path = write_job(tmp_path, job(place, prompt={"messages_column": "m"}))
    ended = run(path, place=place, environ={"FAKE_REAL_TOKENIZER": "1"})
    assert ended.code == 0, ended.stderr
    (warning,) = ended.result["warnings"]
    assert "'human', 'User', 'gpt'" in warning
    assert results(place)["error_type"].is_null().all()
