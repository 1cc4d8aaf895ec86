"""Rows become prompts; a bad row is an error of its own; what is too long is cut at its text."""

from __future__ import annotations

import json
import shutil
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders

from batchinfer.errors import ConfigError, InputError
from batchinfer.prompt import Prompter, check_references, check_type, prompt_columns
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.source import ShardReader, list_shards, read_footer
from batchinfer.storage import open_store
from tests.support.prompts import (
    AFTER,
    BEFORE,
    DEMO,
    MODEL,
    chat,
    kinds_of,
    prompt_of,
    prompter,
    rows_of,
    table,
    texts_of,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def demo() -> pa.Table:
    files = sorted((DEMO / "prompts").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


# The same tokens as transformers


def test_chat_prompts_are_those_of_transformers(demo: pa.Table, tokenizer: Any) -> None:
    content = "Summarize this software package in one line.\n\n{{ description }}"
    prepared = prompter(**chat(content)).prepare(demo)
    expected = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content.replace("{{ description }}", description)}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for description in demo.column("description").to_pylist()
    ]
    assert rows_of(prepared) == expected
    assert prepared.errors == {}


def test_plain_prompts_are_those_of_transformers(demo: pa.Table, tokenizer: Any) -> None:
    texts = demo.column("description").to_pylist()
    assert rows_of(prompter(column="description").prepare(demo)) == tokenizer(texts)["input_ids"]
    prepared = prompter(template="<{{ description }}>").prepare(demo.slice(0, 20))
    assert texts_of(prepared, tokenizer) == [f"<{text}>" for text in texts[:20]]


def test_decoding_gives_the_text_back(demo: pa.Table) -> None:
    made = prompter(column="description")
    prepared = made.prepare(demo)
    assert made.decode(prepared.token_ids, prepared.offsets) == demo["description"].to_pylist()
    special = np.array([1, *prepared.token_ids[:3], 2], dtype=np.int32)
    (text,) = made.decode(special, np.array([0, 5]))
    assert "<|im" not in text
    assert made.decode(special[:0], np.array([0])) == []


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 4200), max_size=12), max_size=6))
def test_any_token_ids_decode_to_what_the_tokenizers_library_says(rows: list[list[int]]) -> None:
    """Halves of characters, special tokens, ids past the vocabulary."""
    made = byte_level()
    assert decoded(made, rows) == library_of(made).decode_batch(rows)


def test_added_tokens_decode_as_the_tokenizers_library_says() -> None:
    made = TokenEncoder(MODEL)
    backend = library_of(made)
    backend.add_tokens(["\u00e9 a", "<tool>", "\u0120x", AddedToken("\u4e2d", normalized=False)])
    backend.add_special_tokens(["<|call|>"])
    size = backend.get_vocab_size()
    rows = [[300, index, 301] for index in range(size - 8, size)]
    assert decoded(made, rows) == backend.decode_batch(rows)
    assert any("<tool>" in text for text in decoded(made, rows))
    assert not any("<|call|>" in text for text in decoded(made, rows))


def test_a_vocabulary_that_is_not_of_bytes_is_left_to_the_library() -> None:
    made = TokenEncoder(MODEL)
    library_of(made).decoder = decoders.WordPiece()
    assert decoded(made, [[300, 301], [], [302]]) == library_of(made).decode_batch(
        [[300, 301], [], [302]]
    )
    assert " " in decoded(made, [[300, 301]])[0]  # between the pieces: WordPiece's way


@cache
def byte_level() -> TokenEncoder:
    return TokenEncoder(MODEL)


def library_of(encoder: TokenEncoder) -> Any:
    return encoder.tokenizer.backend_tokenizer


def decoded(encoder: TokenEncoder, rows: list[list[int]]) -> list[str]:
    flat = np.array([token_id for row in rows for token_id in row], dtype=np.int32)
    return encoder.decode(flat, np.cumsum([0, *map(len, rows)]))


def test_several_threads_prepare_and_decode_concurrently(demo: pa.Table) -> None:
    made = prompter(column="description")
    expected = made.prepare(demo).token_ids.tolist()
    found: list[bool] = []

    def work() -> None:
        prepared = made.prepare(demo)
        made.decode(prepared.token_ids, prepared.offsets)
        found.append(prepared.token_ids.tolist() == expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


@pytest.mark.parametrize(
    "settings",
    [{"column": "text"}, {"template": "{{ text }}"}, chat(), {"messages_column": "text"}],
)
def test_an_empty_table_gives_no_prompts(settings: dict[str, Any]) -> None:
    prepared = prompter(**settings).prepare(pa.table({"text": pa.array([], pa.string())}))
    assert prepared.offsets.tolist() == [0]
    assert (prepared.token_ids.dtype, len(prepared.token_ids)) == (np.dtype(np.int32), 0)


def test_a_template_without_columns_is_the_same_prompt_for_every_row(tokenizer: Any) -> None:
    made = prompter(template="Hello")
    assert made.columns == ()
    assert texts_of(made.prepare(table("a", "b")), tokenizer) == ["Hello", "Hello"]


# Rows that fail, alone


def test_nulls_and_empty_texts_are_errors_of_their_rows(tokenizer: Any) -> None:
    prepared = prompter(column="text").prepare(table("a", None, "", "b"))
    assert kinds_of(prepared) == {1: "missing_value", 2: "empty_prompt"}
    assert texts_of(prepared, tokenizer) == ["a", "", "", "b"]
    assert "'text'" in prepared.errors[1].message
    assert prepared.errors[1].__traceback__ is None  # it would keep the whole table
    assert kinds_of(prompter(**chat()).prepare(table("a", None))) == {1: "missing_value"}
    nulls = pa.table({"text": pa.nulls(2)})
    assert set(kinds_of(prompter(column="text").prepare(nulls)).values()) == {"missing_value"}


def test_bytes_that_are_not_text_are_an_error_of_their_row(tokenizer: Any) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    prepared = prompter(column="text").prepare(pa.table({"text": strings}))
    assert kinds_of(prepared) == {1: "invalid_prompt"}
    assert texts_of(prepared, tokenizer) == ["good", "", "fine"]


def test_values_are_data_and_never_rendered(tokenizer: Any) -> None:
    nasty = "{{ 7 * 7 }}{% for x in y %}"
    assert texts_of(prompter(template="{{ text }}").prepare(table(nasty)), tokenizer) == [nasty]
    (text,) = texts_of(prompter(**chat()).prepare(table(nasty)), tokenizer)
    assert text == BEFORE + nasty + AFTER


@pytest.mark.parametrize(
    "template",
    [
        "{{ text.__class__.__mro__ }}",
        "{{ text | attr('__class__') }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ text.no_such }}",
        "{{ text.upper }}",
        "{{ [text] | map('upper') }}",
        "{{ 1 // (text | length - 4) }}",
        "{{ range(10 ** 9) | list }}{{ text }}",
    ],
)
def test_escapes_and_mistakes_of_a_template_are_template_errors(template: str) -> None:
    assert kinds_of(prompter(template=template).prepare(table("four"))) == {0: "template_error"}


def test_a_failing_row_names_the_variable_and_leaves_the_others(tokenizer: Any) -> None:
    rows = pa.table({"s": pa.array([{"a": 1}, {"a": None}, {"a": 3}])})
    prepared = prompter(template="{{ s.a }}").prepare(rows)
    assert kinds_of(prepared) == {1: "missing_value"}
    assert texts_of(prepared, tokenizer) == ["1", "", "3"]
    prepared = prompter(template="{{ s.missing_key }}").prepare(rows)
    assert "missing_key" in prepared.errors[0].message


def test_every_kind_of_column_reaches_templates_as_plain_values(tokenizer: Any) -> None:
    rows = pa.table(
        {
            "day": pa.array([0], pa.timestamp("ns")),
            "xs": [["a", "b"]],
            "price": pa.array(["1.50"]).cast(pa.decimal128(5, 2)),
            "b": [True],
            "f": [0.5],
        }
    )
    template = "{{ day[:10] }} {{ xs | join('+') }} {{ price }} {{ b }} {{ f * 2 }}"
    prepared = prompter(template=template).prepare(rows)
    assert texts_of(prepared, tokenizer) == ["1970-01-01 a+b 1.50 True 1.0"]


def test_uuids_of_a_file_are_their_usual_text(tmp_path: Path, tokenizer: Any) -> None:
    text = "12345678-1234-5678-1234-567812345678"
    uuids = pa.array([bytes.fromhex(text.replace("-", "")), None], pa.uuid())
    pq.write_table(pa.table({"key": uuids}), tmp_path / "x.parquet")
    (shard,) = list_shards([str(tmp_path / "x.parquet")], open_store)
    made = prompter(template="{{ key or 'none' }}")
    check_references(prompt_of(template="{{ key }}"), read_footer(shard).schema)
    with ShardReader(shard, made.columns) as reader:
        (block,) = reader.blocks(0, 2)
    assert texts_of(made.prepare(block.table), tokenizer) == [text, "none"]


# Refused before anything runs


def test_a_variable_that_is_not_a_column_is_refused_with_the_nearest() -> None:
    prompt = prompt_of(**chat("{{ descripton }}"))
    with pytest.raises(ConfigError, match=r"messages\[0\].*descripton.*'description'"):
        prompt_columns(prompt, ["id", "description"])
    assert prompt_columns(prompt_of(template="{{ b }}{{ a }}"), ["a", "b"]) == ["a", "b"]
    assert prompt_columns(prompt_of(column="x"), []) == ["x"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"template": "{% if x %}"}, "prompt.template, line 1"),
        ({"template": "{{ xs | random }}"}, "random"),
        ({"template": "{{ ''.__class__ ~ text }}"}, "prompt.template: access to attribute"),
        (chat(chat_template="{% for %}"), "prompt.chat_template, line 1"),
        (chat(chat_template="{{ raise_exception('no users') }}{{ messages }}"), "no users"),
        ({"column": "text", "max_tokens": 2048}, "no room for a prompt"),
    ],
)
def test_what_would_fail_in_every_row_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prompter(**settings)
    assert sentence in str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        prompter(path=str(folder), **chat())
    prompter(path=str(folder), column="text")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prompter(path=str(folder), column="text")


def test_a_column_of_another_type_is_refused() -> None:
    numbers = pa.table({"text": [1, 2]})
    for key in ("column", "messages_column", "token_ids_column"):
        with pytest.raises(InputError, match=f"prompt.{key}: column 'text' is int64"):
            prompter(**{key: "text"}).prepare(numbers)


# Token ids


def test_token_ids_are_taken_as_they_are_and_checked() -> None:
    ids = [[1, 2, 3], None, [], [4096], [5, -1], [7, None], [4095]]
    column = pa.chunked_array([pa.array(ids[:2], pa.list_(pa.int64())), pa.array(ids[2:])])
    made = prompter(token_ids_column="ids")
    prepared = made.prepare(pa.table({"ids": column}))
    assert rows_of(prepared) == [[1, 2, 3], [], [], [], [], [], [4095]]
    assert kinds_of(prepared) == {
        1: "missing_value",
        2: "empty_prompt",
        3: "invalid_prompt",
        4: "invalid_prompt",
        5: "invalid_prompt",
    }
    assert "token id -1 at position 1" in prepared.errors[4].message
    sliced = made.prepare(pa.table({"ids": column}).slice(3))
    assert rows_of(sliced) == [[], [], [], [4095]]
    assert rows_of(made.prepare(pa.table({"ids": column}).slice(0, 0))) == []


@pytest.mark.parametrize(
    "data_type",
    [pa.list_(pa.uint8()), pa.list_(pa.uint64()), pa.list_(pa.int16(), 2)],
)
def test_token_ids_are_of_any_integer_type(data_type: pa.DataType) -> None:
    column = pa.array([[9, 9], [1, 2], None, [3, 4]], data_type).slice(1)
    prepared = prompter(token_ids_column="ids").prepare(pa.table({"ids": column}))
    assert rows_of(prepared) == [[1, 2], [], [3, 4]]
    assert kinds_of(prepared) == {1: "missing_value"}


def test_a_token_id_too_large_for_a_signed_number_is_an_error_of_its_row() -> None:
    column = pa.array([[2**63 + 5], [1]], pa.list_(pa.uint64()))
    prepared = prompter(token_ids_column="ids").prepare(pa.table({"ids": column}))
    assert kinds_of(prepared) == {0: "invalid_prompt"}
    assert "token id 9223372036854775813 at position 0" in prepared.errors[0].message


@pytest.mark.parametrize("entry", [pa.float64(), pa.bool_(), pa.string(), pa.list_(pa.int64())])
def test_lists_of_something_else_than_integers_are_refused(entry: pa.DataType) -> None:
    schema = pa.schema({"ids": pa.list_(entry)})
    with pytest.raises(InputError, match=r"prompt.token_ids_column: column 'ids' is list"):
        check_type(prompt_of(token_ids_column="ids"), schema)


@pytest.mark.parametrize(
    ("on_too_long", "kept"),
    [("truncate_left", list(range(60, 100))), ("truncate_right", list(range(40))), ("error", [])],
)
def test_token_ids_that_are_too_long_are_cut(on_too_long: str, kept: list[int]) -> None:
    made = prompter(
        token_ids_column="ids", on_too_long=on_too_long, max_model_len=50, max_tokens=10
    )
    prepared = made.prepare(pa.table({"ids": [[1], list(range(100)), list(range(40))]}))
    assert rows_of(prepared) == [[1], kept, list(range(40))]
    assert list(prepared.errors) == ([1] if on_too_long == "error" else [])


# Too long


def test_too_long_is_an_error_with_the_numbers() -> None:
    prepared = prompter(column="text", max_model_len=20, max_tokens=10).prepare(
        table("short", "long " * 50)
    )
    assert kinds_of(prepared) == {1: "prompt_too_long"}
    for number in ("max_tokens 10", "max_model_len 20"):
        assert number in prepared.errors[1].message


def test_a_frame_that_does_not_fit_empty_is_too_long() -> None:
    made = prompter(**chat(on_too_long="truncate_right"), max_model_len=14, max_tokens=10)
    assert kinds_of(made.prepare(table("x" * 500))) == {0: "prompt_too_long"}


def test_without_a_user_message_nothing_is_cut() -> None:
    made = prompter(
        messages_column="text", on_too_long="truncate_left", max_model_len=20, max_tokens=10
    )
    value = json.dumps([{"role": "system", "content": "long " * 50}])
    assert kinds_of(made.prepare(table(value))) == {0: "prompt_too_long"}


def test_the_last_user_content_is_cut_and_no_other() -> None:
    made = prompter(
        messages_column="text", on_too_long="truncate_right", max_model_len=120, max_tokens=10
    )
    talk = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "word " * 500},
        {"role": "assistant", "content": "so far"},
    ]
    prepared = made.prepare(table(json.dumps(talk)))
    (text,) = made.decode(prepared.token_ids, prepared.offsets)
    assert prepared.errors == {}
    for other in ("first question", "first answer", "so far"):
        assert other in text
    assert 100 < len(prepared.token_ids) <= 110


@cache
def cutter(side: str, kind: str) -> Prompter:
    settings = chat("{{ text }}") if kind == "chat" else {"column": "text"}
    return prompter(**settings, on_too_long=side, max_model_len=60, max_tokens=20)


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
@pytest.mark.parametrize("kind", ["chat", "column"])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=400), min_size=1, max_size=4))
def test_what_is_cut_fits_keeps_the_frame_and_is_one_end_of_the_text(
    tokenizer: Any, side: str, kind: str, texts: list[str]
) -> None:
    prepared = cutter(side, kind).prepare(table(*texts))
    assert kinds_of(prepared) == {}
    before, after = (BEFORE, AFTER) if kind == "chat" else ("", "")
    frame = [tokenizer(part)["input_ids"] for part in (before, after)]
    for original, ids in zip(texts, rows_of(prepared), strict=True):
        assert len(ids) <= 40
        assert ids[: len(frame[0])] == frame[0]
        assert ids[len(ids) - len(frame[1]) :] == frame[1]
        content = tokenizer.decode(ids)[len(before) :].removesuffix(after)
        is_end = original.endswith if side == "truncate_left" else original.startswith
        assert is_end(content)
        whole = len(tokenizer(before + original + after)["input_ids"])
        assert len(ids) >= min(whole, 40) - 12


class _SlowTokenizer:
    """The demo tokenizer as one without a Rust backend looks: no offsets, not thread-safe."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return self._fast(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)


def test_a_tokenizer_without_offsets_works_too(
    demo: pa.Table, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"on_too_long": "truncate_right", "max_model_len": 60, "max_tokens": 20}
    fast = prompter(**chat("{{ description }}"), **content)
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: _SlowTokenizer(tokenizer)
    )
    slow = prompter(**chat("{{ description }}"), **content)
    rows = demo.slice(0, 50)
    found, expected = rows_of(slow.prepare(rows)), rows_of(fast.prepare(rows))
    assert all(10 < len(ids) <= 40 for ids in found)
    is_whole = [len(ids) < 30 for ids in expected]
    assert [ids for ids, whole in zip(found, is_whole, strict=True) if whole] == [
        ids for ids, whole in zip(expected, is_whole, strict=True) if whole
    ]
    prepared = slow.prepare(rows)
    assert slow.decode(prepared.token_ids, prepared.offsets) == fast.decode(
        prepared.token_ids, prepared.offsets
    )
