"""Chat templates rendered without transformers: the same functions, filters and white space.

Templates of models are written for transformers' environment, so what they find here has its names.
Must not know: tokenizers, rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_jinja_template(
    conversations: Sequence[Any],
    *,
    chat_template: str,
    tools: Any = None,
    documents: Any = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **arguments: Any,
) -> tuple[list[str], list[list[int]]]:
    """The texts of conversations; the second list, of what an assistant wrote, is always empty.

    Raises jinja2's TemplateError, ValueError for a last message that the text does not end with.
    """
    template = _compiled(chat_template)
    texts = []
    for messages in conversations:
        text = template.render(
            messages=messages,
            tools=_schemas(tools),
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )
        texts.append(_left_open(text, messages[-1]) if continue_final_message else text)
    return texts, []


def _schemas(tools: Any) -> Any:
    if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
        raise TypeError("tools must be JSON schemas of functions")
    return tools


def _left_open(text: str, last: Mapping[str, Any]) -> str:
    """The text up to the end of the last message's content."""
    content = last["content"]
    if isinstance(content, list):
        content = next(part["text"] for part in reversed(content) if "text" in part)
    content = str(content)
    for wanted in (content, content.strip()):
        if (place := text.rfind(wanted)) >= 0:
            return text[: place + len(wanted)]
    raise ValueError(
        "continue_final_message is set but the final message does not appear in the chat after "
        "applying the chat template"
    )


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it of the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
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
