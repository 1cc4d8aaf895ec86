"""Templates and filters over given columns: right ones, odd ones, and text that is neither."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.fuzz.odds import rarely

_FILTERS = (
    "upper",
    "trim",
    "default('-')",
    "default('-', true)",
    "d",
    "tojson",
    "length",
    "int",
    "float",
    "join(', ')",
    "first",
    "last",
    "list",
    "string",
    "replace('a', 'b')",
    "round(1)",
    "sort",
    "sum",
    "abs",
    "e",
    "safe",
    "forceescape",
    "urlize",
    "urlencode",
    "wordwrap(3)",
    "truncate(4)",
    "xmlattr",
    "dictsort",
    "items",
    "map(attribute='a')",
    "map('upper')",
    "selectattr('a')",
    "groupby('a')",
    "pprint",
    "format(1)",
    "batch(2)",
    "slice(2)",
    "indent",
    "striptags",
    "title",
    "center",
    "unique",
    "min",
    "max",
    "reverse",
    "wordcount",
    "filesizeformat",
    "attr('a')",
    "random",
    "nosuchfilter",
)
_TESTS = ("none", "defined", "string", "number", "mapping", "iterable", "divisibleby 2", "in [1]")
_EXPRESSIONS = (
    "V + 1",
    "V * 3",
    "V % 0",
    "V ~ V",
    "V < 1",
    "-V",
    "not V",
    "V.a",
    "V[0]",
    "V['a']",
    "V.__class__",
    "V.__class__.__mro__",
    "V.items()",
    "V.append(1)",
    "V()",
    "V.upper",
    "V if V else 'none'",
    "V or 'x'",
    "V == V",
    "V in 'abc'",
    "'%s' % V",
    "'{}'.format(V)",
    "range(V)",
    "[V, V]",
    "{'k': V}",
    "row.items()",
    "nowhere",
    "self",
    "namespace(a=V)",
    "cycler(1)",
    "1 / 0",
    "2 ** 70",
    "'a' * 100",
    "none",
    "undefined_function()",
)
_BLOCKS = (
    "{% if V %}yes{% else %}no{% endif %}",
    "{% if V is not none %}{{ V }}{% endif %}",
    "{% for x in V %}{{ x }}{{ loop.index }}{% else %}nothing{% endfor %}",
    "{% for x in V recursive %}{{ loop(x) }}{% endfor %}",
    "{% for k, v in V.items() %}{{ k }}={{ v }}{% endfor %}",
    "{% set x = V %}{{ x }}",
    "{% set V2 %}{{ V }}{% endset %}{{ V2 }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(V) }}",
    "{% filter upper %}{{ V }}{% endfilter %}",
    "{% with y = V %}{{ y }}{% endwith %}",
    "{% raw %}{{ V }}{% endraw %}",
    "{# {{ V }} #}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% from 'x' import y %}",
    "{% block b %}{{ V }}{% endblock %}",
    "{% do V %}",
    "{% break %}",
    "{% if V %}",
    "{{ V",
    "V }}",
    "{% endfor %}",
    "{{ }}",
    "{% for x in range(10) %}{% for y in range(10) %}{{ V }}{% endfor %}{% endfor %}",
    "{%- if true -%} {{- V -}} {%- endif -%}",
    "{% set ns = namespace(n=0) %}{% set ns.n = 1 %}{{ ns.n }}",
    "{% autoescape true %}{{ V }}{% endautoescape %}",
    "{% trans %}x{% endtrans %}",
)
_PLAIN = (
    "Summarize: ",
    "\n",
    " ",
    "",
    "prompts/template.txt",
    "{",
    "}}",
    "100 %",
    "é",
    "\x00",
    "$text",
)


@st.composite
def templates(draw: st.DrawFn, columns: Sequence[str]) -> str:
    """Some pieces, the first a column that is printed."""
    pieces = [f"{{{{ {draw(_variables(columns))} }}}}"] if not rarely(draw, 10) else []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(
            st.sampled_from(("plain", "value", "filter", "filter", "test", "expr", "block"))
        )
        name = draw(_variables(columns))
        if kind == "plain":
            pieces.append(draw(st.sampled_from(_PLAIN) | st.text(max_size=5)))
        elif kind == "value":
            pieces.append(f"{{{{ {name} }}}}")
        elif kind == "filter":
            chain = draw(st.lists(st.sampled_from(_FILTERS), min_size=1, max_size=2))
            pieces.append(f"{{{{ {name} | {' | '.join(chain)} }}}}")
        elif kind == "test":
            pieces.append(f"{{{{ {name} is {draw(st.sampled_from(_TESTS))} }}}}")
        elif kind == "expr":
            pieces.append("{{ " + draw(st.sampled_from(_EXPRESSIONS)).replace("V", name) + " }}")
        else:
            pieces.append(draw(st.sampled_from(_BLOCKS)).replace("V", name))
    return "".join(pieces)


def _variables(columns: Sequence[str]) -> st.SearchStrategy[str]:
    """Ways to say a column."""
    if not columns:
        return st.sampled_from(("text", "row", "x"))
    return st.sampled_from([_said(name) for name in columns])


def _said(name: str) -> str:
    is_plain = name.isidentifier() and name.isascii() and name not in _WORDS
    return name if is_plain else f"row[{_quoted(name)}]"


def _quoted(name: str) -> str:
    """A text in Jinja, which reads escapes as Python does."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


#: What a template cannot say by itself.
_WORDS = ("if", "loop", "self", "none", "range", "namespace", "row", "import", "true", "in")

_CONDITIONS = (
    "{c} IS NOT NULL",
    "{c} IS NULL",
    "{c} = {c}",
    "{c} > 1",
    "{c} <> 'a'",
    "{c} LIKE '%a%'",
    "{c} IN (1, 2)",
    "{c} IN ('a', '')",
    "{c} BETWEEN 0 AND 5",
    "LENGTH({c}) < 5",
    "LOWER({c}) = 'a'",
    "CAST({c} AS VARCHAR) <> ''",
    "CAST({c} AS INT) > 0",
    "{c} + 1 > 0",
    "{c} % 2 = 0",
    "{c} / 0 > 1",
    "ABS({c}) >= 0",
    "{c}",
    "NOT {c}",
    "{c} > DATE '2020-01-01'",
    "{c} > '2020-01-01'",
    "COALESCE({c}, 0) = 0",
    "1 = 1",
    "true",
    "false",
)
_ODD_CONDITIONS = (
    "REGEXP_LIKE({c}, '[')",
    "{c} > (SELECT 1)",
    "COUNT({c}) > 0",
    "{c} > AVG({c})",
    "ROW_NUMBER() OVER () = 1",
    "RANDOM() > 0.5",
    "NULL",
    "1",
    "",
    "SELECT 1",
    "{c} >",
    "nosuchcolumn = 1",
    "DROP TABLE x",
    "*",
    "{c} -- comment",
    "{c}; {c}",
    "{c}[0] = 1",
    "{c}.a = 1",
    "ARRAY_LENGTH({c}) > 0",
    "STRPTIME({c}, '%Y') IS NULL",
)


@st.composite
def filters(draw: st.DrawFn, columns: Sequence[str]) -> str:
    """A condition, or two."""
    conditions = []
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        name = draw(st.sampled_from(list(columns) or ["text"]))
        is_odd = rarely(draw, 8)
        condition = draw(st.sampled_from(_ODD_CONDITIONS if is_odd else _CONDITIONS))
        conditions.append(condition.replace("{c}", '"' + name.replace('"', '""') + '"'))
    return draw(st.sampled_from((" AND ", " OR "))).join(conditions)
