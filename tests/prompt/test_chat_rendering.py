"""Chat templates without transformers write what they write with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template as theirs

from batchinfer.errors import RowError
from batchinfer.prompt import sandbox
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.chat_rendering import ChatRenderer
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


ODDITIES = {
    "macro": "{% macro f(m) -%}<{{ m.content|trim }}>{%- endmacro %}{% for m in messages %}"
    "{{ f(m) }}{{ loop.cycle('a', 'b') }}{{ loop.nextitem.role if loop.nextitem is defined }}"
    "{% endfor %}",
    "undefined": "{{ nothing }}{{ messages[0].x }}{% for a in nothing %}x{% endfor %}{{ none }}"
    "{{ 7 // 2 ~ none ~ nothing }}{{ messages }}{{ cycler('a', 'b').next() }}{{ 'ab' * 3 }}",
    "filters": "{{ messages | map(attribute='content') | join('~') }}{{ messages | string }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%.2f' | format(3) }}"
    "{{ messages | tojson(indent=2, sort_keys=true) }}{{ messages[0].content.split('<')[-1] }}"
    "{{ messages[0].content | upper | replace('B', 'c') | indent(2) | wordwrap(5) }}{{ '<' | e }}",
    "scope": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
}
OPEN = {name: TEMPLATES[name] for name in ("demo", "white space", "generation")}
OPEN["parts"] = (
    "{% for m in messages %}{{ m.content[0].text if m.content is not string }}|{% endfor %}"
)


def in_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image"}]


@pytest.mark.parametrize("name", [*TEMPLATES, *ODDITIES])
@pytest.mark.parametrize("arguments", [{"add_generation_prompt": True}, {"tools": TOOLS}])
def test_a_template_writes_the_same_text(name: str, arguments: dict[str, Any]) -> None:
    source = (TEMPLATES | ODDITIES)[name]
    settings = {"bos_token": "<s>", "add_generation_prompt": False, **arguments}
    ours = ChatRenderer(source, is_left_open=False, **settings)
    talks = [CONVERSATION, CONVERSATION[:2]]
    assert [ours.render(talk) for talk in talks] == theirs(talks, chat_template=source, **settings)[
        0
    ]


@pytest.mark.parametrize("name", list(OPEN))
@pytest.mark.parametrize("content", ["Because of ", "Because", " <think>\n\n</think> So\n"])
def test_a_last_message_is_left_open_at_the_same_place(name: str, content: str) -> None:
    last = in_parts(content) if name == "parts" else content
    talk = [*CONVERSATION[:2], {"role": "assistant", "content": last}]
    settings = {"bos_token": "", "add_generation_prompt": False}
    ours = ChatRenderer(OPEN[name], is_left_open=True, **settings).render(talk)
    source = OPEN[name]
    assert [ours] == theirs([talk], chat_template=source, continue_final_message=True, **settings)[
        0
    ]
    assert ours.endswith(content if "trim" not in source else content.strip())


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)
def test_a_last_message_that_is_not_written_once_cannot_be_left_open(source: str) -> None:
    renderer = ChatRenderer(source, is_left_open=True)
    with pytest.raises(ValueError, match="cannot be continued"):
        renderer.render(CONVERSATION)


def test_a_template_that_raises_does_so_in_its_own_words() -> None:
    renderer = ChatRenderer("{{ raise_exception('no such role') }}", is_left_open=False)
    with pytest.raises(TemplateError, match="no such role"):
        renderer.render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content * 10**9 }}",
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{{ j }}{% endfor %}{% endfor %}",
        "{{ '%01000000000d' % 1 }}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '0123456789' }}{% endmacro %}{{ f(40) }}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x | tojson }}",
        "{{ tools | tojson(indent=10**9) }}",
        "{{ tools | tojson(separators=('x' * 10**8, 'y')) }}",
    ],
)
def test_a_text_without_an_end_is_the_rows_error(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_MAX_STEPS", 20_000)  # a million calls are 19 s
    monkeypatch.setattr(sandbox, "_MAX_LOOPED", 80_000)
    renderer = ChatRenderer(source, is_left_open=False, tools=TOOLS)
    with pytest.raises(OverflowError):
        renderer.render(CONVERSATION)


@pytest.mark.parametrize("source", ["{{ messages | random }}", "{{ lipsum() }}{{ messages }}"])
def test_what_a_second_run_would_write_differently_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match=r"random|lipsum"):
        ChatRenderer(source, is_left_open=False).render(CONVERSATION)


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
