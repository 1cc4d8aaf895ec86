"""Job files over an input: most are right, many have a mistake or two, some are no YAML.

Locations stay inside the case's folder, and sizes stay small enough for a case of some milliseconds
unless a limit of the job file itself should have refused them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz import arrow, own, texts
from tests.fuzz.odds import rarely
from tests.fuzz.settings import BEGIN, FITTING, KEYS, LOCATIONS, ODD, PIECES, SECTIONS, TAKEN
from tests.fuzz.tables import Input

MODEL = "jobs/demo/model"


@st.composite
def job_texts(draw: st.DrawFn, source: Input) -> str:
    """The text of a job file over these columns; the input is in `in`, results go to `out`."""
    columns = list(dict.fromkeys(n for table in source.tables for n in table.column_names))
    settings = draw(_settings(source, columns))
    for key in draw(st.lists(st.sampled_from(sorted(FITTING)), max_size=4, unique=True)):
        section, _, name = key.partition(".")
        settings.setdefault(section, {})[name] = draw(st.sampled_from(FITTING[key]))
    if rarely(draw, 3):
        settings["sampling"]["per_row"] = draw(own.per_row(source, columns))
    if settings["sampling"].get("temperature", 0) > 0 and draw(st.booleans()):
        settings["sampling"]["n"] = draw(st.sampled_from((2, 3)))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2, 0, 0, 0, 0)))):
        draw(_mutation(settings, columns))
    text = draw(_spelt(settings))
    return draw(_damaged(text)) if rarely(draw, 24) else text


@st.composite
def _settings(draw: st.DrawFn, source: Input, columns: Sequence[str]) -> dict[str, Any]:
    is_flat = all("/" not in name for name in source.shards)
    listed = [f"in/{name}" for name in source.shards if "/" not in name and "[" not in name]
    paths: list[Any] = ["in", "in/", "in/**/*.parquet"]
    if is_flat:
        paths += ["in/*.parquet", "in/*", "in/?*.parquet"]
        paths += [listed] * (len(listed) == len(source.shards))
    section: dict[str, Any] = {"path": draw(st.sampled_from(paths))}
    some = _of(columns)
    if columns and draw(st.booleans()):
        section["id_column"] = draw(some)
    if columns and draw(st.booleans()):
        free = [name for name in columns if name not in TAKEN or rarely(draw, 10)]
        section["keep_columns"] = draw(st.lists(_of(free), max_size=4, unique=True))
    if rarely(draw, 4):
        section["filter"] = draw(texts.filters(columns))
    return {
        "version": 1,
        "name": "fuzz",
        "input": section,
        "prompt": draw(_prompt(source, columns)),
        "model": {"path": MODEL},
        "sampling": {"max_tokens": draw(st.integers(1, 9))},
        "output": {"path": "out"},
    }


def _of(columns: Sequence[str]) -> st.SearchStrategy[str]:
    """A column, rarely a name of none."""
    return st.sampled_from([*columns, *columns, "nosuchcolumn", *columns, *columns])


@st.composite
def _prompt(draw: st.DrawFn, source: Input, columns: Sequence[str]) -> dict[str, Any]:
    kind = draw(
        st.sampled_from(
            ("column", "template", "template", "messages", "messages_column", "token_ids_column")
        )
    )
    likely = _likely(source, kind)
    if kind == "template" or not (likely or kind == "messages" or rarely(draw, 10)):
        prompt: dict[str, Any] = {"template": draw(texts.templates(columns))}
    elif kind == "messages":
        roles = st.sampled_from(("user", "user", "system", "assistant", "tool", "developer"))
        message = st.fixed_dictionaries({"role": roles, "content": texts.templates(columns)})
        prompt = {kind: draw(st.lists(message, min_size=1, max_size=3))}
    else:
        prompt = {kind: draw(_of(likely or columns))}
    if kind in prompt and kind.startswith("messages") and rarely(draw, 5):
        prompt["continue_final_message"] = draw(st.booleans())
    if kind in prompt and kind.startswith("messages") and rarely(draw, 5):
        prompt["chat_template"] = draw(
            st.sampled_from(
                (
                    "{{ messages }}",
                    "{% for m in messages %}{{ m.content }}{% endfor %}",
                    "{{ messages[0]['content'] + messages[1]['content'] }}",
                    "{{ raise_exception('no') }}",
                    "{{ x }}",
                    "{% for",
                    "constant",
                )
            )
        )
        prompt["chat_template_kwargs"] = draw(
            st.sampled_from(
                (
                    {},
                    {"x": 1},
                    {"messages": []},
                    {"tools": 7},
                    {"tools": [{"type": "function", "function": {"name": "f"}}]},
                    {"add_generation_prompt": False},
                    {"enable_thinking": False},
                )
            )
        )
    return prompt


def _likely(source: Input, kind: str) -> list[str]:
    """Columns whose type begins as the prompt's would."""
    begin = BEGIN.get(kind, ("nothing",))
    fields = (field for table in source.tables for field in table.schema)
    return list(dict.fromkeys(f.name for f in fields if str(f.type).startswith(begin)))


@st.composite
def _mutation(draw: st.DrawFn, settings: dict[str, Any], columns: Sequence[str]) -> None:
    """Change one thing in place."""
    section = draw(st.sampled_from(SECTIONS))
    key = draw(st.sampled_from(KEYS[section]))
    kind = draw(
        st.sampled_from(("odd", "odd", "odd", "text", "drop", "unknown", "section", "place"))
    )
    held = settings.get(section)
    inner = held if isinstance(held, dict) else {}
    if kind == "drop":
        name = draw(st.sampled_from([*sorted(settings), key]))
        settings.pop(name, None) if name in settings else inner.pop(name, None)
    elif kind == "section":
        settings[section] = draw(st.sampled_from(ODD))
    elif kind == "unknown":
        inner[draw(st.sampled_from((key.upper(), key + "s", "x", "", "é", "a.b")))] = 1
        settings[section] = inner
    elif kind == "place":
        where = draw(st.sampled_from(("input", "input", "output", "model")))
        if isinstance(settings.get(where), dict):
            settings[where]["path"] = draw(st.sampled_from(LOCATIONS))
    else:
        values = st.sampled_from(ODD) if kind == "odd" else arrow.texts | _of(columns)
        inner[key] = draw(st.sampled_from(LOCATIONS) if key == "path" else values)
        settings[section] = inner


@st.composite
def _spelt(draw: st.DrawFn, settings: dict[str, Any]) -> str:
    """As YAML in one of the ways people and programs write it."""
    style = draw(st.sampled_from(("block", "flow", "json", "alias")))
    if style == "json":
        return json.dumps(settings)
    text: str = yaml.safe_dump(
        settings,
        default_flow_style=style == "flow",
        allow_unicode=draw(st.booleans()),
        sort_keys=False,
        width=draw(st.sampled_from((40, 10_000))),
    )
    if style == "alias":
        return text.replace("name: fuzz", "name: &name fuzz").replace("out\n", "*name\n")
    return text


@st.composite
def _damaged(draw: st.DrawFn, text: str) -> str:
    """With a piece cut out, or one put in."""
    start = draw(st.integers(0, len(text)))
    length = draw(st.sampled_from((0, 1, 5, len(text))))
    piece = draw(st.sampled_from(PIECES))
    return text[:start] + piece + text[start + length :]
