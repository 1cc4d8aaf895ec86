"""Chat templates rendered as by transformers: the same functions, filters and white space, and so
the same text.

Templates of models are written for transformers' environment, so what they find here has its names.
It is a sandbox with an end of what one conversation makes, as for the templates of prompts, and
without what a second run would write differently: `random` and `lipsum`. Must not know: tokenizers,
rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from batchinfer.prompt import bounds
from batchinfer.prompt.sandbox import Sandbox, begin_row, bounded_range

_MARK = "Zk4open4kZ"  # at the end of a message that is left open; found again in the text


class ChatRenderer:
    """A compiled chat template with its fixed `arguments`."""

    def __init__(self, source: str, *, is_left_open: bool, **arguments: Any) -> None:
        """`is_left_open`: a text ends with its last message's content. Raises jinja2's
        TemplateError, TypeError for tools or documents that cannot be.
        """
        self._template = _compiled(source)
        self._is_left_open = is_left_open
        tools, documents = arguments.get("tools"), arguments.get("documents")
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise TypeError("tools must be JSON schemas of functions")
        if documents is not None and not all(isinstance(text, Mapping) for text in documents):
            raise TypeError("documents must be mappings with a title and a text")
        self._arguments = {"tools": None, "documents": None, **arguments}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation.

        Raises jinja2's TemplateError, ValueError for a last message that the text does not end
        with, OverflowError for a text without an end.
        """
        begin_row()
        if not self._is_left_open:
            return self._template.render(messages=messages, **self._arguments)
        content, marked = _marked(messages[-1]["content"])
        messages = [*messages[:-1], {**messages[-1], "content": marked}]
        return _left_open(self._template.render(messages=messages, **self._arguments), content)


def _marked(content: Any) -> tuple[str, Any]:
    """The text of a message's content, and the content with the mark behind it."""
    if isinstance(content, str):
        return content, f"{content}{_MARK} "
    at = max(index for index, part in enumerate(content) if "text" in part)
    text = content[at]["text"]
    return text, [*content[:at], {**content[at], "text": f"{text}{_MARK} "}, *content[at + 1 :]]


def _left_open(text: str, content: str) -> str:
    """The text up to its mark, without the white space that the template takes from contents."""
    place = text.rfind(_MARK)
    if place < 0 or _MARK in text[:place] or content.strip() not in text:
        raise ValueError(
            "the chat template does not write the last message once and as it is, so it cannot be "
            "continued"
        )
    is_trimmed = text[place + len(_MARK) :][:1] != " "
    return text[:place].rstrip() if is_trimmed else text[:place]


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it of the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as there: what is set in it ends with it.
        return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

    @staticmethod
    def written(caller: Callable[[], str]) -> str:
        return caller()


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_finite,
    )
    del environment.filters["random"], environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "range": bounded_range,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    tree = environment.parse(source)
    environment.count_loops(tree)
    return environment.from_string(tree)


def _finite(value: Any) -> Any:
    bounds.check_printable(value)
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    bounds.check_json(value, indent)
    longest = max(map(len, separators or ("",)))
    bounds.check_chars(longest * bounds.size_of(value).entries)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the template's day is the reader's
