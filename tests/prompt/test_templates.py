"""Templates say which columns they read; what cannot be meant is refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batchinfer.config import PromptSettings
from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt import prompt_columns
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.render import TextTemplate
from batchinfer.source import Block


def refusal(source: str, columns: list[str], **settings: Any) -> str:
    """What is said about a template of these columns; empty if nothing."""
    prompt = PromptSettings.model_validate({"template": source, **settings})
    try:
        prompt_columns(prompt, columns)
    except ConfigError as error:
        return str(error)
    return ""


def messages_refusal(columns: list[str], *contents: str, **settings: Any) -> str:
    messages = [{"role": "user", "content": content} for content in contents]
    return refusal("", columns, template=None, messages=messages, **settings)


# A prompt that reads nothing of the row


@pytest.mark.parametrize(
    "path",
    ["prompts/ask.j2", "ask.txt", "./ask", "~/ask", "s3://prompts/ask", "{existing}", " ask.md\n"],
)
def test_a_path_in_place_of_a_template_is_named(path: str, tmp_path: Any) -> None:
    existing = tmp_path / "ask"
    existing.write_text("{{ text }}")
    path = path.format(existing=existing)
    said = f"{path.strip()} is a path, but this key takes the template's text"
    assert f"prompt.template: {said}" in refusal(path, ["text"])
    assert f"prompt.messages[1].content: {said}" in messages_refusal(["text"], "{{ text }}", path)


@pytest.mark.parametrize(
    ("braces", "column"),
    [
        ("{text}", "text"),
        ("${text}", "text"),
        ("%(text)s", "text"),
        ("{text!r:>8}", "text"),
        ("{text.strip()}", "text"),
        ("{Product Name}", 'row["Product Name"]'),
    ],
)
def test_braces_of_other_languages_are_named_with_what_to_write(braces: str, column: str) -> None:
    said = refusal(f"Say it shorter: {braces}", ["id", "text", "Product Name"])
    assert f"{braces} is not a variable" in said
    assert f"write {{{{ {column} }}}}" in said


def test_braces_beside_a_variable_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    source = '{{ text }} in {context}, as {"key": 1} or {other}'
    for _ in range(3):
        assert refusal(source, ["text", "context"]) == ""
    (record,) = caplog.records
    assert "{context} stays as it is" in record.message
    assert record.levelname == "WARNING"


@pytest.mark.parametrize("source", ["Hello", "{# {{ text }} #}x", "{% set text = 1 %}{{ text }}"])
def test_a_prompt_without_any_column_is_refused(source: str) -> None:
    assert "uses no input column" in refusal(source, ["text"])
    assert "{{ text }}" in refusal(source, ["text"])
    assert "prompt.messages uses no input column" in messages_refusal(["text"], "Be brief.", source)
    assert messages_refusal(["text"], "Be brief.", "{{ text }}") == ""
    assert refusal("{% set _ = text %}" + source, ["text"]) == ""


def test_a_chat_template_writes_out_the_conversation() -> None:
    def said(template: str) -> str:
        return messages_refusal(["text"], "{{ text }}", chat_template=template)

    assert "prompt.chat_template does not use `messages`" in said("Say {{ eos_token }}")
    assert "does not use `messages`" in said("a messages template without braces")
    assert "prompt.chat_template, line 2: " in said("Say\n{{ messages")
    assert said("{% for m in messages %}{{ m.content }}{% endfor %}") == ""
    assert said("tool_use") == ""  # maybe one of the tokenizer's own, by name

    class Tokenizer:
        name_or_path = "x"
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

        def get_chat_template(self, template: str | None, tools: Any = None) -> str:
            return template or "no conversation"

    with pytest.raises(ConfigError, match=r"the tokenizer's chat template does not use"):
        ChatTemplate(Tokenizer(), None, {})
    with pytest.raises(ConfigError, match=r"there is no chat template 'tool_use'"):
        ChatTemplate(Tokenizer(), "tool_use", {})


# Columns of any name


ODD_NAMES = ("Product Name", "label-coarse", "2nd", "meta.title", "a'b", 'a"b', "what?", "0", " x")
MEANT_OTHERWISE = ("true", "not", "self", "range", "loop", "row", "a\\b\n", "{{ x }}", "ü b", "")


@pytest.mark.parametrize("name", [*ODD_NAMES, *MEANT_OTHERWISE])
def test_any_column_can_be_named_by_its_row(name: str) -> None:
    template = TextTemplate(f"{{{{ row[{json.dumps(name)}] }}}}/{{{{ x }}}}", "prompt.template")
    assert template.columns == tuple(sorted((name, "x")))
    assert template.render({name: "value", "x": 1}) == "value/1"
    assert refusal(f"{{{{ row[{json.dumps(name)}] }}}}", ["x", name]) == ""


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ label-coarse }}", "label-coarse"),
        ("{% if label-coarse == 'L0' %}x{% endif %}{{ label }}", "label-coarse"),
        ("{{ Product Name }}", "Product Name"),
        ("{{ 2nd | upper }}", "2nd"),
        ("{{ meta.title }}", "meta.title"),
        ("{{ what? }}", "what?"),
        ("{{ 0 }}", "0"),
        ("{{ true }}", "true"),
        ("{{ not }}", "not"),
    ],
)
def test_a_name_that_jinja_misreads_is_refused(source: str, name: str) -> None:
    """A name that jinja reads otherwise is refused whatever other columns there are."""
    columns = ["label", "coarse", "meta", "text", name]
    said = refusal(source, columns)
    assert f"prompt.template has {name!r}" in said
    assert f'row["{name}"]' in said
    assert "rename" in said


@pytest.mark.parametrize(
    "source",
    [
        "{{ label - coarse }}",
        "{{ text[0] }}",
        "{{ text | replace('label-coarse', '') }}",
        "{% raw %}{{ label-coarse }}{% endraw %}{{ text }}",
        "{% if true %}{{ text }}{% endif %}",
        "{{ x.label-coarse }}",
        "{{ text }}",
    ],
)
def test_what_only_looks_like_such_a_name_is_left_alone(source: str) -> None:
    columns = ["label", "coarse", "text", "x", "label-coarse", "0", "true", "text "]
    assert refusal(source, columns) == ""


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ s }} {{ \u017f }}", "ess long"),
        ("{{ fi }} {{ \ufb01 }}", "f-i ligature"),
        ("{{ \u00e9 }} {{ e\u0301 }}", "one two"),
        ("{{ name_0 }} {{ \u017f }}", "own long"),
        ("{% set \u017f = 'set' %}{{ s }} {{ \u017f }}", "ess set"),
        ("{% for \u017f in 'ab' %}{{ s }}{{ \u017f }} {% endfor %}", "essa essb "),
        ("{% macro f(s, \u017f) %}{{ s }}{{ \u017f }}{% endmacro %}{{ f(s=3, \u017f=4) }}", "34"),
        ("{% macro \ufb01() %}macro{% endmacro %}{{ \ufb01() }} {{ fi }}", "macro f-i"),
        ("{% set n = namespace(a=1) %}{% set n.a = \ufb01 %}{{ n.a }}", "ligature"),
    ],
)  # fmt: skip
def test_names_that_are_one_for_python_are_two_columns(source: str, text: str) -> None:
    """Python reads names in NFKC, in which each of these pairs is one name."""
    values = {"s": "ess", "\u017f": "long", "fi": "f-i", "\ufb01": "ligature", "name_0": "own"}
    values |= {"\u00e9": "one", "e\u0301": "two"}
    assert TextTemplate(source, "prompt.template").render(values) == text


def test_a_variable_of_the_template_called_row_stays_its_own() -> None:
    template = TextTemplate(
        '{% for row in table %}{{ row["x"] }},{% endfor %}{{ text }}', "prompt.template"
    )
    assert template.columns == ("table", "text")
    assert template.render({"table": [{"x": 1}, {"x": 2}], "text": "t"}) == "1,2,t"


@pytest.mark.parametrize("source", ["{{ row }}", "{{ row[text] }}", "{{ row.text }}"])
def test_the_row_is_read_by_names_that_are_written_out(source: str) -> None:
    assert 'row["name of a column"]' in refusal(source, ["text"])


def test_a_column_called_row_is_a_variable_like_others() -> None:
    template = TextTemplate('{{ row }}{{ row["x"] }}{{ row["row"] }}', "prompt.template")
    assert template.render({"row": "r", "x": "x"}) == "rxr"


def test_the_nearest_name_is_given_as_a_template_writes_it() -> None:
    assert "did you mean 'description'?" in refusal("{{ descripton }}", ["description"])
    assert 'did you mean row["text "]?' in refusal("{{ text }}", ["text "])
    assert "there are a, b" in refusal("{{ zzz }}", ["a", "b"])


# What no template of one row can do


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% include 'x' %}{{ text }}", "include: there are no other templates"),
        ("{% import 'x' as x %}{{ text }}", "import: there are no other templates"),
        ("{% from 'x' import y %}{{ text }}", "there are no other templates"),
        ("{% extends 'x' %}{{ text }}", "extends: there are no other templates"),
        ("{% if text %}{{ text | shorten }}{% endif %}", "there is no filter 'shorten'"),
        ("{% if text is long %}{{ text }}{% endif %}", "there is no test 'long'"),
        ("{{ text | replace('a') }}", "filter 'replace': missing a required argument: 'new'"),
        ("{{ text | upper(1) }}", "filter 'upper': too many positional arguments"),
        ("{{ range }}{{ text }}", 'row["range"]'),
        ("{{ self }}{{ text }}", 'row["self"]'),
        ("{{ " + "(" * 3000 + "text" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ text" + " | upper" * 3000 + " }}", "nested too deeply"),
        ("{% for x in text %}" * 25 + "{{ text }}" + "{% endfor %}" * 25, "nested blocks"),
        ("{{ " + "9" * 5000 + " }}{{ text }}", "too many digits (more than 4300)"),
    ],
)
def test_what_would_fail_in_every_row_is_refused(source: str, sentence: str) -> None:
    assert sentence in refusal(source, ["text"])


def test_blocks_macros_and_filters_on_lists_work() -> None:
    source = (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice(text) }}"
        "{% block b %}{{ row['text'] | upper }}{% endblock %}{{ self.b() }}"
        "{{ text | list | map('upper') | join('-') }}"
    )
    assert TextTemplate(source, "prompt.template").render({"text": "ab"}) == "ababABABA-B"


# Integers end

_HUGE = [
    "{{ 10**(n*100000000) }}",
    "{{ (10**(n*10000000)) % 7 }}",
    "{% set ns = namespace(x=n+9) %}"
    "{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ n | round(-100000000) }}",
    "{{ n | round(100000000, 'ceil') }}",
    "{{ ('f' * (n * 100000000)) | int(base=16) % ('e' * 50000000) | int(base=16) }}",
    "{{ n.from_bytes(('a' * 100000000).encode(), 'big') // 7 }}",
    "{{ (tenth ** -999999) | int }}",
    "{{ n.to_bytes(100000000000, 'big') | length }}",
]
_DOUBLED = "{%% set ns = namespace(x='x') %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"
_LISTS = (
    "{% set ns = namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
)
#: What makes gigabytes of nothing, or loops for ever.
_LONG = [
    "{{ '%2000000000d' % n }}",
    "{{ '%.2000000000f' % 1.5 }}",
    "{{ '%*d' % (n * 2000000000, n) }}",
    "{{ '%(a)2000000000d' % {'a': n} }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "{{ '%2000000000s' | format(n) }}",
    "{{ '{:2000000000}'.format(n) }}",
    "{{ '{:{}}'.format(n, n * 2000000000) }}",
    "{{ '{:.2000000000f}'.format(1.5) }}",
    "{{ ('{a}' * 100000).format(a='x' * 100000) }}",
    "{{ '{a:2000000000}'.format_map({'a': n}) }}",
    "{{ 'x' * 10**10 }}",
    "{{ [1, 2] * 10**9 }}",
    "{{ 'x' | center(2000000000) }}",
    "{{ 'x'.zfill(2000000000) }}",
    "{{ ('\t' * 100000).expandtabs(100000) }}",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}",
    "{{ ('x' * 1000000).join('y' * 1000000) }}",
    "{{ ('x' * 1000000) | join('y' * 1000000) }}",
    "{{ (['x' * 1000000] * 1000000) | join }}",
    "{{ ('x' * 1000000).translate({120: 'y' * 1000000}) }}",
    "{{ 'x' | indent(10**9) }}",
    "{{ ('\n' * 100000) | indent('x' * 100000, true, true) }}",
    "{{ ('a b ' * 100000) | wordwrap(1, true, 'x' * 1000000) }}",
    "{{ ('http://a.b ' * 100000) | urlize(target='x' * 1000000) }}",
    "{{ [1, 2] | tojson(indent=10**9) }}",
    "{{ ([1] * 1000000) | tojson(indent=1000000) }}",
    "{{ [1] | slice(10**8) | list | length }}",
    "{{ [1] | batch(10**8, 1) | list | length }}",
    "{{ ([[1] * 10000] * 10000) | sum(start=[]) | length }}",
    "{{ ('x ' * 60000000) | wordcount }}",
    "{{ ('x ' * 60000000) | list | length }}",
    "{{ ('x ' * 60000000).split() | length }}",
    _DOUBLED % "{% set ns.x = ns.x ~ ns.x %}",
    _DOUBLED % "{% set ns.x = ns.x + ns.x %}",
    _DOUBLED % "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
    _DOUBLED % "{% set ns.x = '{0}{0}'.format(ns.x) %}",
    _DOUBLED % "{% set ns.x = ns.x.replace('x', 'xx') %}",
    _DOUBLED % "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
    _LISTS + "{{ ns.x }}",
    *(f"{_LISTS}{{{{ ns.x | {name} }}}}" for name in ("tojson", "string", "join", "upper")),
    *(_LISTS + one for one in ("{{ ns.x ~ '' }}", "{{ '%s' % ns.x }}", "{{ '{}'.format(ns.x) }}")),
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set x = 'x' * 10000 %}"
    "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 10000 %}{% for b in 'x' * 10000 %}"
    "{% for c in ['y'] | map('upper') %}{% endfor %}{% endfor %}{% endfor %}",
]
_RENDER_EACH = """
import json, pathlib, sys
from batchinfer.errors import RowError
from batchinfer.prompt import sandbox
from batchinfer.prompt.numbers import ExactNumber
from batchinfer.prompt.render import TextTemplate
sandbox._MAX_STEPS, sandbox._MAX_LOOPED = 20_000, 80_000  # of seconds otherwise
for source in json.load(sys.stdin):
    try:
        print(TextTemplate(source, "prompt.template").render({"n": 1, "tenth": ExactNumber("0.1")}))
    except RowError as error:
        print(error.kind, error)
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss has the parent's memory in it
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""


@pytest.mark.parametrize("sources", [_HUGE, _LONG], ids=["integers", "texts"])
def test_what_has_no_end_is_its_rows_error_before_it_is_computed(sources: list[str]) -> None:
    """One is a single call into Python of minutes, and no signal ends it: so another process."""
    shown = subprocess.run(
        [sys.executable, "-c", _RENDER_EACH],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.splitlines()
    mib = int(shown.pop())
    assert len(shown) == len(sources)
    for source, line in zip(sources, shown, strict=True):
        assert line.startswith("template_error prompt.template: OverflowError: "), (source, line)
        assert "more than " in line, (source, line)
    assert mib < 1500


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 3**(n*200000) % 1000 }}", "1"),
        ("{{ 1**(n*10**12) }}{{ (n-1)**(10**12) }}{{ (-n)**(10**12+1) }}", "10-1"),
        ("{{ 2**-n }} {{ 2.0**n }} {{ 2**70 // 2**69 }}", "0.5 2.0 2"),
        ("{{ 7 % (n*4) }} {{ '%s!' % n }} {{ 'ab' * (n*2) }}", "3 1! abab"),
        (
            "{{ n | round | int }} {{ 2.345 | round(2, 'floor') }} {{ 'ff' | int(base=16) }}",
            "1 2.34 255",
        ),
    ],
)
def test_integers_that_end_are_computed(source: str, text: str) -> None:
    assert TextTemplate(source, "prompt.template").render({"n": 1}) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{{ '%5d|%-5s|%.2f|%%|%(' % (n, 'a', 1.0) if n > 1 else '%5d|%.2f' % (n, 1.0) }}",
            "    1|1.00",
        ),
        ("{{ '%(a)s-%(b)03d' % {'a': 'x', 'b': n} }} {{ '%s %s' | format('a', n) }}", "x-001 a 1"),
        ("{{ '{:>5}|{a!r:<4}|{:{}}'.format(n, 3, 2, a='b') }}", "    1|'b' | 3"),
        ("{{ '{a[b]}'.format_map({'a': {'b': n}}) }}", "1"),
        ("{{ 'a,b'.split(',') | join('-') }} {{ ','.join(['a', 'b']) }}", "a-b a,b"),
        ("{{ ['a', 'b'] | map('upper') | join(', ') }}", "A, B"),
        ("{{ [{'v': 'a'}, {'v': 'b'}] | join('+', attribute='v') }}", "a+b"),
        ("{{ 'a\nb' | indent(2) }} {{ 'aXb' | replace('X', '--') }}", "a\n  b a--b"),
        ("{{ [[1], [2]] | sum(start=[]) }} {{ [1, 2] | sum }}", "[1, 2] 3"),
        ("{{ [1, {'a': 2}] | tojson(indent=1) | length }}", "22"),
        ("{{ range(5) | batch(2, 0) | list }}", "[[0, 1], [2, 3], [4, 0]]"),
        ("{{ range(5) | slice(2) | list }}", "[[0, 1, 2], [3, 4]]"),
        (
            "{{ n ~ 'a' ~ [n] ~ none }} {{ 'a' + 'b' }} {{ [n] + [2] }} {{ n + 1.5 }}",
            "1a[1]None ab [1, 2] 2.5",
        ),
        (
            "{% for a in [1, 2, 3] | map('string') if a != '2' %}"
            "{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ', ' }}{% endfor %}",
            "1/2, 2/2",
        ),
        (
            "{% for k, v in {'a': [1, 2]}.items() recursive %}{{ k }}{{ v }}{% endfor %}"
            "{% for a in [] %}{% else %}none{% endfor %}",
            "a[1, 2]none",
        ),
        ("{{ '&<' | escape }}{{ ('<b>{}</b>' | safe).format('&') }}", "&amp;&lt;<b>&amp;</b>"),
    ],
)
def test_what_has_an_end_is_rendered_as_ever(source: str, text: str) -> None:
    assert TextTemplate(source, "prompt.template").render({"n": 1}) == text


# Rows without columns


@pytest.mark.parametrize(
    "source",
    [
        "{{ text | batch(2) | trim }}",
        "{{ text.upper ~ '' }}",
        "{{ text | map('upper') | upper }}",
        "{{ '%s' % text.split }}",
        "{{ xs | select | title }}",
    ],
)
def test_an_address_of_an_object_is_not_a_prompt(source: str) -> None:
    """It would be another prompt in each run."""
    with pytest.raises(RowError, match="address of a Python object"):
        TextTemplate(source, "prompt.template").render({"text": "ab", "xs": ["a"]})


@pytest.mark.parametrize(
    "source", ["{{ text }}", "{{ text | upper }}", "at 0x7f3c5a2b1d40 {{ n }}"]
)
def test_an_address_in_a_value_or_in_the_template_is_text(source: str) -> None:
    values = {"text": "segfault <main> at 0x7f3c5a2b1d40", "n": 1}
    assert "0x7f3c5a2b1d40" in TextTemplate(source, "prompt.template").render(values).lower()


def test_rows_of_a_table_without_columns_are_counted() -> None:
    rows = np.arange(5, 10)
    block = Block(rows, pa.table({"x": rows}).select([])).take(np.array([0, 3]))
    assert (block.rows.tolist(), block.table.num_rows, block.table.num_columns) == ([5, 8], 2, 0)
