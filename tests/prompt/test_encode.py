"""What tokenizers add, cut and pad by their own settings, and texts far longer than a prompt."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import normalizers

from batchinfer.prompt import tokenize
from batchinfer.prompt.encode import TokenEncoder, slice_chars_of
from tests.support.prompts import MODEL, chat, kinds_of, prompter, rows_of, table

BOS = "<|endoftext|>"
EOS = "<|im_end|>"
SPECIAL = {BOS: 0, EOS: 2}

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], str]:
    """A copy of the demo model with other settings in its tokenizer.json."""

    def make(change: Change) -> str:
        folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
        file = folder / "tokenizer.json"
        settings = json.loads(file.read_text())
        change(settings)
        file.write_text(json.dumps(settings))
        return str(folder)

    return make


def around(before: str | None, after: str | None) -> Change:
    """Special tokens around each text."""

    def change(settings: dict[str, Any]) -> None:
        tokens = [token for token in (before, after) if token]
        pieces = [{"SpecialToken": {"id": before, "type_id": 0}}] if before else []
        pieces.append({"Sequence": {"id": "A", "type_id": 0}})
        pieces += [{"SpecialToken": {"id": after, "type_id": 0}}] if after else []
        settings["post_processor"]["single"] = pieces
        settings["post_processor"]["special_tokens"] = {
            token: {"id": token, "ids": [SPECIAL[token]], "tokens": [token]} for token in tokens
        }

    return change


# Special tokens


@pytest.mark.parametrize("settings", [{"column": "text"}, {"template": "{{ text }}"}])
def test_a_beginning_that_a_text_brings_itself_is_not_doubled(
    changed: Callable[[Change], str], settings: dict[str, str]
) -> None:
    path = changed(around(BOS, None))
    own, bare = rows_of(prompter(path=path, **settings).prepare(table(BOS + "Hello", "Hello")))
    assert own == bare
    assert own[0] == 0 and own[1] != 0
    (twice,) = rows_of(prompter(path=path, **settings).prepare(table(BOS + BOS + "Hello")))
    assert twice == [0, *bare]  # what the text says twice is there twice


def test_a_chat_template_writes_the_beginning_itself(changed: Callable[[Change], str]) -> None:
    path = changed(around(BOS, None))
    assert rows_of(prompter(path=path, **chat()).prepare(table("x"))) == rows_of(
        prompter(**chat()).prepare(table("x"))
    )


def test_an_end_that_a_tokenizer_appends_is_said(
    changed: Callable[[Change], str], caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(around(BOS, EOS))
    made = prompter(path=path, column="text")
    own, bare = rows_of(made.prepare(table("Hello" + EOS, "Hello")))
    assert own == bare and bare[-1] == 2
    assert f"ends each prompt with {EOS}" in caplog.text
    caplog.clear()
    prompter(path=path, **chat())
    assert caplog.text == ""


def test_truncation_and_padding_in_tokenizer_json_do_not_touch_prompts(
    changed: Callable[[Change], str],
) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        settings["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": BOS,
        }

    rows = table("a few words, more than four tokens", "x")
    expected = rows_of(prompter(column="text").prepare(rows))
    path = changed(change)
    assert rows_of(prompter(path=path, column="text").prepare(rows)) == expected
    slow = TokenEncoder(path)
    slow._backend = None  # as of a tokenizer in Python
    found = slow.encode(rows["text"].to_pylist(), add_special_tokens=True)
    assert [ids.tolist() for ids in found] == expected


# Far too long


def letters(num_chars: int) -> str:
    return "a" * num_chars


def noise(num_chars: int) -> str:
    return base64.b64encode(random.Random(0).randbytes(num_chars)).decode()[:num_chars]


def words(num_chars: int) -> str:
    generator = random.Random(0)
    vocabulary = [
        "house",
        "of",
        "the",
        "sea 17",
        "Straße",
        "\n\n",
        "中文",
        "    ",
        "x = f(y);",
        "🎈",
    ]
    return " ".join(generator.choices(vocabulary, k=num_chars // 5))


@pytest.mark.parametrize("text_of", [letters, noise])
@pytest.mark.parametrize("settings", [{"column": "text"}, chat("{{ text }}")])
@pytest.mark.parametrize("on_too_long", ["error", "truncate_left"])
def test_one_huge_text_costs_neither_memory_nor_time(
    text_of: Callable[[int], str], settings: dict[str, Any], on_too_long: str
) -> None:
    made = prompter(**settings, on_too_long=on_too_long)
    made.prepare(table("warm up " * 20_000))
    rows = table("short", text_of(20_000_000))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before_kib, before_s = _peak_kib(), time.monotonic()
    prepared = made.prepare(rows)
    assert time.monotonic() - before_s < 10
    assert _peak_kib() - before_kib < 300 * 1024
    if on_too_long == "error":
        assert kinds_of(prepared) == {1: "prompt_too_long"}
        assert "more than 2000 prompt tokens (2" in prepared.errors[1].message
    else:
        assert kinds_of(prepared) == {}
        assert 1990 < len(rows_of(prepared)[1]) <= 2000


@pytest.mark.parametrize("text_of", [letters, noise, words])
@pytest.mark.parametrize("keeps_end", [False, True])
def test_what_is_left_of_a_long_text_has_the_tokens_of_the_whole(
    text_of: Callable[[int], str], keeps_end: bool
) -> None:
    encoder = TokenEncoder(MODEL)
    text = text_of(400_000)
    left = encoder.bounded(text, 2000, keeps_end=keeps_end)
    assert len(left) < len(text)
    assert text.endswith(left) if keeps_end else text.startswith(left)
    whole, part = encoder.encode([text, left], add_special_tokens=False)
    assert len(part) > 2000
    if keeps_end:
        assert part[-2000:].tolist() == whole[-2000:].tolist()
    else:
        assert part[:2000].tolist() == whole[:2000].tolist()


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
def test_a_long_text_is_cut_to_the_same_prompt_as_a_whole_one(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**chat("{{ text }}"), "on_too_long": side, "max_model_len": 500}
    rows = table(words(300_000))
    made = prompter(**settings)
    assert len(rows["text"][0].as_py()) > slice_chars_of(made.limit.max_tokens)
    found = rows_of(made.prepare(rows))
    monkeypatch.setattr(tokenize, "slice_chars_of", lambda _: 10**9)  # encodes all of it
    assert found == rows_of(made.prepare(rows))


def test_a_long_text_that_fits_is_a_prompt() -> None:
    """A tokenizer that drops white space makes few tokens of many characters."""
    made = prompter(column="text", max_model_len=512)
    made._encoder._backend.normalizer = normalizers.Strip()
    text = "few words" + " " * (2 * slice_chars_of(464))
    short, long = rows_of(made.prepare(table("few words", text)))
    assert short == long
    far = "few words" + " " * 5_000_000
    assert kinds_of(made.prepare(table(far))) == {0: "prompt_too_long"}


def test_a_huge_frame_is_too_long_without_the_rows_text() -> None:
    made = prompter(messages_column="text", on_too_long="truncate_right")
    talk = [{"role": "system", "content": letters(1_000_000)}, {"role": "user", "content": "x"}]
    prepared = made.prepare(table(json.dumps(talk)))
    assert kinds_of(prepared) == {0: "prompt_too_long"}
    assert "even without the row's text" in prepared.errors[0].message


def test_many_long_rows_are_prepared_a_part_at_a_time() -> None:
    """Rows of a file that stores a repeated text once can be far larger than the file."""
    made = prompter(column="text")
    texts = [str(i) if i % 3 else letters(3_000_000) for i in range(60)] + ["", "end"]
    rows = pa.table({"text": texts})
    assert rows.nbytes > 50e6
    prepared = made.prepare(rows)
    kinds = {i: "prompt_too_long" for i in range(0, 60, 3)}
    assert kinds_of(prepared) == kinds | {60: "empty_prompt"}
    expected = rows_of(made.prepare(table(*(t for t in texts if 0 < len(t) < 9))))
    assert [ids for ids in rows_of(prepared) if ids] == expected


def _peak_kib() -> int:
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)
