"""Chat templates without transformers write what they write with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template as theirs

from batchinfer.errors import RowError
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.chat_rendering import render_jinja_template
from batchinfer.prompt.gguf_encoder import GgufEncoder
from tests.support.jobs import MODEL

CONVERSATION = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "  Why is\nthe sky blue? é  "},
    {"role": "assistant", "content": "Because of "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": [1, None, True]}}}]
TEMPLATES = {
    "demo": (MODEL / "chat_template.jinja").read_text(),
    "white space": "{% for m in messages %}\n  {% if loop.first %}\n{{ bos_token }}\n"
    "  {%- endif %}\n[{{ m['role'] }}] {{ m.content | trim }}\n{% endfor %}\n",
    "tools": "{{ tools | tojson(indent=2) }}{{ tools | tojson }}{{ messages | length }}",
    "control": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if m.role == 'user' %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }} {{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("arguments", [{"add_generation_prompt": True}, {"tools": TOOLS}])
def test_a_template_writes_the_same_text(name: str, arguments: dict[str, Any]) -> None:
    settings = {"chat_template": TEMPLATES[name], "bos_token": "<s>", **arguments}
    ours = render_jinja_template([CONVERSATION, CONVERSATION[:2]], **settings)[0]
    assert ours == theirs([CONVERSATION, CONVERSATION[:2]], **settings)[0]


@pytest.mark.parametrize("name", ["demo", "white space", "generation"])
def test_a_last_message_is_left_open_at_the_same_place(name: str) -> None:
    settings = {"chat_template": TEMPLATES[name], "continue_final_message": True, "bos_token": ""}
    ours = render_jinja_template([CONVERSATION], **settings)[0]
    assert ours == theirs([CONVERSATION], **settings)[0]
    assert ours[0].endswith("Because of " if "trim" not in TEMPLATES[name] else "Because of")


def test_a_template_that_raises_does_so_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match="no such role"):
        render_jinja_template([[]], chat_template="{{ raise_exception('no such role') }}")


def test_the_template_in_a_file_is_found_and_its_refusals_are_the_rows(demo_gguf: Path) -> None:
    tokenizer = GgufEncoder(str(demo_gguf)).tokenizer
    chat = ChatTemplate(tokenizer, None, {})
    assert chat.source == TEMPLATES["demo"]
    text = chat.render([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    refusing = ChatTemplate(
        tokenizer,
        "{% if messages and messages[0].content == 'x' %}{{ raise_exception('not that') }}"
        "{% endif %}{{ messages }}",
        {},
    )
    with pytest.raises(RowError, match="not that"):
        refusing.render([{"role": "user", "content": "x"}])
