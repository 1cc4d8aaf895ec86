"""Chat formats by name, from a file and as text, and what is said where they do not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from batchinfer.config import PromptSettings
from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.formats import FORMATS
from batchinfer.prompt.gguf_encoder import GgufEncoder
from batchinfer.prompt.messages import Messages
from tests.support.jobs import MODEL

TALK: Messages = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]


class Tokenizer:
    """Of a model without a chat template, with tokens for everything that formats write."""

    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012
    name_or_path = "nowhere"

    def __init__(self, own: str | dict[str, str] | None = None, lacks: str = "") -> None:
        self.chat_template = own
        self._lacks = lacks

    def get_vocab(self) -> dict[str, int]:
        marks = [mark for known in FORMATS.values() for mark in known.marks]
        return {mark: 1 for mark in marks if mark != self._lacks}

    def get_chat_template(self, template: str | None, tools: Any = None) -> str:
        if template is None and not isinstance(self.chat_template, str):
            raise ValueError("none")
        return template or str(self.chat_template)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant"
            "\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nU1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1"
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|><|start_header_id|>"
            "assistant<|end_header_id|>\n\n",
        ),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]",
        ),
        ("mistral", "<s>[INST] S\n\nU1[/INST] A1</s>[INST] U2[/INST]"),
        (
            "gemma",
            "<s><start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
            "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "phi3",
            "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2"
            "<|end|>\n<|assistant|>\n",
        ),
        (
            "zephyr",
            "<|system|>\nS</s>\n<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n"
            "<|assistant|>\n",
        ),
        ("vicuna", "<s>S\n\nUSER: U1\nASSISTANT: A1</s>\nUSER: U2\nASSISTANT:"),
        (
            "alpaca",
            "<s>S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction:\nU2\n\n"
            "### Response:\n",
        ),
    ],
)
def test_a_format_writes_a_conversation(name: str, written: str) -> None:
    assert ChatTemplate(Tokenizer(), name, {}).render(TALK) == written


def test_no_format_changes_for_outputs_were_begun_with_it() -> None:
    texts = json.dumps({name: known.template for name, known in sorted(FORMATS.items())})
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "959d67691758ab18"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_last_message_of_the_assistant_is_left_open(name: str) -> None:
    template = ChatTemplate(Tokenizer(), name, {}, continues=True)
    assert template.render([TALK[1], {"role": "assistant", "content": "It is"}]).endswith("It is")


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_a_system_message_alone_has_no_place_in_some_formats(name: str) -> None:
    with pytest.raises(RowError, match="no place for a system message without a message of the"):
        ChatTemplate(Tokenizer(), name, {}).render(TALK[:1])


@pytest.mark.parametrize("code", ["m.content.strip", "m.content | map('upper')"])
def test_a_given_template_does_not_print_addresses(code: str) -> None:
    source = f"{{% for m in messages %}}{{{{ {code} }}}}{{% endfor %}}"
    template = ChatTemplate(Tokenizer(), source, {})
    with pytest.raises(RowError, match="the address of a Python object"):
        template.render(TALK[1:2])
    its_own: Messages = [{"role": "user", "content": "read at 0x7f00aa"}]
    as_text = ChatTemplate(Tokenizer(), "{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert as_text.render(its_own) == "read at 0x7f00aa"


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_turns_that_a_format_cannot_write_are_the_errors_of_their_rows(name: str) -> None:
    template = ChatTemplate(Tokenizer(), name, {})
    for talk in ([TALK[1], TALK[1]], [TALK[2]], [TALK[1], TALK[0]]):
        with pytest.raises(RowError, match="user and assistant in turn"):
            template.render(talk)


def test_a_template_of_the_tokenizer_goes_before_a_format_of_its_name() -> None:
    own = {"chatml": "{{ messages[0].content }}!"}
    assert ChatTemplate(Tokenizer(own), "chatml", {}).render(TALK[1:2]) == "U1!"


def test_tokens_that_the_vocabulary_lacks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    ChatTemplate(Tokenizer(), "chatml", {})
    assert not caplog.records
    ChatTemplate(Tokenizer(lacks="<|im_end|>"), "chatml", {})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "chatml writes <|im_end|>, which this tokenizer does not have as tokens" in said


def test_a_format_is_for_a_gguf_file_too(demo_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What its vocabulary lacks is said; a template that the file has by the name goes before."""
    tokenizer = GgufEncoder(str(demo_gguf)).tokenizer
    for name in sorted(FORMATS):
        assert "U1" in ChatTemplate(tokenizer, name, {}).render(TALK[1:2])
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("mistral writes [INST] and [/INST]" in text for text in said)
    assert not any("chatml" in text for text in said)


def test_a_template_of_a_gguf_file_is_found_by_its_name(demo_gguf: Path, tmp_path: Path) -> None:
    content = demo_gguf.read_bytes()
    key, name = b"tokenizer.chat_template", b"tokenizer.ggml.model"  # one of as many strings
    assert content.count(key) == 1 and name in content
    file = tmp_path / "named.gguf"
    length = len(key).to_bytes(8, "little")
    longer = (len(key) + 6).to_bytes(8, "little")
    file.write_bytes(content.replace(length + key, longer + key + b".plain"))
    tokenizer = GgufEncoder(str(file)).tokenizer
    assert ChatTemplate(tokenizer, "plain", {}).render(TALK[1:2]).startswith("<|im_start|>user\nU1")
    with pytest.raises(ConfigError, match="several chat templates and no default: give one of"):
        ChatTemplate(tokenizer, None, {})


def test_a_name_that_nobody_knows_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as refused:
        ChatTemplate(Tokenizer({"plain": "{{ messages }}"}), "chatmll", {})
    assert "there is no chat template 'chatmll' (did you mean chatml?)" in str(refused.value)
    assert "the tokenizer has plain, and there are alpaca, chatml" in str(refused.value)
    with pytest.raises(ConfigError, match=r"no chat template: give one .* by name"):
        ChatTemplate(Tokenizer(), None, {})


# Files


def settings(chat_template: str) -> PromptSettings:
    return PromptSettings(messages_column="m", chat_template=chat_template)


def test_a_file_is_read_and_its_text_is_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(MODEL / "chat_template.jinja", tmp_path / "my.jinja"))
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "my.jinja", "./my.jinja"):
        assert settings(name).chat_template == path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows' editors begin a file
    assert settings("my.jinja").chat_template == (MODEL / "chat_template.jinja").read_text()
    Path("chatml").write_text("{{ messages }}")
    assert settings("chatml").chat_template == "chatml"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("gone.jinja", None, "there is no file gone.jinja .relative paths start at"),
        ("./mine", None, "there is no file ./mine"),
        ("s3://bucket/a.jinja", None, "there is no file s3://bucket/a.jinja"),
        ("empty.jinja", b" \n", "the file empty.jinja is empty"),
        ("big.txt", b"x" * (1 << 21), "the file big.txt is larger than 1 MiB"),
        ("latin.j2", b"{{ messages }}\xe9", "the file latin.j2 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_a_template_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValidationError, match=problem):
        settings(name)


@pytest.mark.parametrize("text", ["{{ messages }}/x", "chatml", "{% for m in messages %}\n.txt"])
def test_a_name_and_a_text_stay_what_they_are(text: str) -> None:
    assert settings(text).chat_template == text
