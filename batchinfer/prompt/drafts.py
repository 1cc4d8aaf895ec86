"""One row's values to the text of its prompt, and which part of that text may be cut.

Must not know: tokens. A draft can be wrapped again around a shorter content, so that a cut never
touches what the templates wrote.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa

from batchinfer.config import PromptSettings
from batchinfer.errors import ConfigError, InputError, RowError
from batchinfer.prompt.chat import ChatTemplate, is_name
from batchinfer.prompt.messages import Messages, last_user, parse_messages, type_problem
from batchinfer.prompt.reference_types import reference_problem
from batchinfer.prompt.references import ROW
from batchinfer.prompt.remarks import Remark, Remarks, sentence
from batchinfer.prompt.render import TextTemplate, text_template
from batchinfer.prompt.wording import (
    foreign_names,
    refuse_chat_template,
    refuse_constant,
    refuse_path,
    refuse_unsayable,
    written,
)
from batchinfer.source import has_uuids

logger = logging.getLogger("batchinfer.prompt")


@dataclass(frozen=True, slots=True)
class Draft:
    """`wrap(content) == text`. `content` None: nothing may be cut."""

    text: str
    content: str | None
    wrap: Callable[[str], str]
    remarks: Sequence[Remark] = ()


Drafter = Callable[[Mapping[str, Any]], Draft]  # raises RowError


def prompt_columns(prompt: PromptSettings, available: Sequence[str]) -> list[str]:
    """Input columns the prompt needs. Raises ConfigError for a template that cannot be meant so."""
    sources = _sources(prompt)
    for key, source in sources:
        refuse_path(source, key)
        refuse_unsayable(source, key, available)
    for template in _templates(prompt):
        for name in template.columns:
            if name not in available:
                raise ConfigError(f"{template.key} {_unknown(name, available)}")
    columns = needed_columns(prompt)
    if not columns:
        refuse_constant(sources, "prompt.messages" if prompt.messages else sources[0][0], available)
    for key, source in sources:
        for as_it_is, column in foreign_names(source, available):
            _warn_once(
                f"{key}: {as_it_is} stays as it is in every prompt; if you mean the column, write "
                f"{{{{ {written(column)} }}}}"
            )
    # A name may be one of the tokenizer's templates, and that is not loaded here.
    if prompt.chat_template is not None and not is_name(prompt.chat_template):
        refuse_chat_template(prompt.chat_template, "prompt.chat_template")
    return columns


def needed_columns(prompt: PromptSettings) -> list[str]:
    """The same without a look at the input."""
    column = prompt.column or prompt.messages_column or prompt.token_ids_column
    if column is not None:
        return [column]
    return sorted({name for template in _templates(prompt) for name in template.columns})


def check_type(prompt: PromptSettings, schema: pa.Schema) -> None:
    """Raise InputError if a column that is a whole prompt cannot be one."""
    types = pa.types
    for key, name, is_right, wanted in (
        ("column", prompt.column, types.is_string, "text; for numbers use prompt.template"),
        ("token_ids_column", prompt.token_ids_column, _holds_token_ids, "a list of integers"),
    ):
        if name is None:
            continue
        found = schema.field(name).type
        if not is_right(found) and not types.is_null(found):
            raise InputError(f"prompt.{key}: column {name!r} is {found}, not {wanted}")
    if (name := prompt.messages_column) and (problem := type_problem(schema.field(name).type)):
        raise InputError(f"prompt.messages_column: column {name!r} {problem}")


def check_references(prompt: PromptSettings, schema: pa.Schema) -> None:
    """Raise InputError if a column has not what a template reads of it, so that every row fails."""
    for template in _templates(prompt):
        for place in template.references:
            field = schema.field(place.column)
            data_type = pa.uuid() if has_uuids(field) else field.type
            if problem := reference_problem(place, data_type):
                raise InputError(f"{template.key}: {problem}")


def make_drafter(prompt: PromptSettings, chat: ChatTemplate | None) -> Drafter:
    """`chat` is needed for messages and messages_column. Raises ConfigError."""
    if prompt.column is not None:
        column = prompt.column
        return lambda row: _text_draft(row[column])
    if prompt.template is not None:
        (template,) = _templates(prompt)
        return lambda row: _text_draft(template.render(row))
    assert chat is not None
    if prompt.messages_column is not None:
        messages_column = prompt.messages_column
        continues = prompt.continue_final_message
        remarks = Remarks(chat.render, chat.source, continues=continues)

        def draft(row: Mapping[str, Any]) -> Draft:
            messages = parse_messages(row[messages_column])
            if continues and messages[-1]["role"] != "assistant":
                raise RowError(
                    "invalid_prompt",
                    "the last message is not the assistant's: there is nothing to continue "
                    "(prompt.continue_final_message)",
                )
            found = remarks.of(messages)
            if remarks.is_user_left_out(messages):
                raise RowError(
                    "invalid_prompt",
                    "the chat template leaves out all that the user says (prompt.chat_template)",
                )
            return _chat_draft(chat, messages, found)

        return draft
    assert prompt.messages is not None
    parts = [
        (message.role, template)
        for message, template in zip(prompt.messages, _templates(prompt), strict=True)
    ]
    _check_roles(chat, parts, continues=prompt.continue_final_message)
    return lambda row: _chat_draft(
        chat, [{"role": role, "content": template.render(row)} for role, template in parts]
    )


def _check_roles(
    chat: ChatTemplate, parts: Sequence[tuple[str, TextTemplate]], *, continues: bool
) -> None:
    """What the chat template does with the roles, it does in every row."""
    probe: Messages = [{"role": role, "content": "x"} for role, _ in parts]
    try:
        chat.render(probe)
    except RowError as error:
        raise ConfigError(f"prompt.messages: the model refuses them: {error.message}") from error
    remarks = Remarks(chat.render, chat.source, continues=continues)
    reading = [index for index, (_, template) in enumerate(parts) if template.columns]
    if remarks.is_left_out(probe, reading):
        raise ConfigError(
            "prompt.messages: the chat template leaves out every message that reads a column, so "
            "every row would get the same prompt: give another prompt.chat_template, or other roles"
        )
    for kind, about in remarks.of(probe):
        logger.warning("prompt.messages: %s", sentence(kind, [about]))


def _sources(prompt: PromptSettings) -> list[tuple[str, str]]:
    """(key, text) of each template of a row's values."""
    if prompt.template is not None:
        return [("prompt.template", prompt.template)]
    return [
        (f"prompt.messages[{index}].content", message.content)
        for index, message in enumerate(prompt.messages or ())
    ]


def _templates(prompt: PromptSettings) -> list[TextTemplate]:
    return [text_template(source, key) for key, source in _sources(prompt)]


def _unknown(name: str, available: Sequence[str]) -> str:
    """The message about a variable that is not a column."""
    if name == ROW:
        return (
            f'uses {ROW!r} otherwise than as {ROW}["name of a column"], with the name written out'
        )
    close = difflib.get_close_matches(name, available, n=1)
    hint = f"there are {', '.join(available) or 'none'}"
    if close:
        as_variable = written(close[0])
        hint = f"did you mean {as_variable if as_variable != close[0] else repr(close[0])}?"
    return f"uses {name!r}, which is not an input column; {hint}"


@cache
def _warn_once(text: str) -> None:
    """Every shard is checked, and the same is said of each."""
    logger.warning("%s", text)


def _text_draft(text: str) -> Draft:
    return Draft(text, text, lambda content: content)


def _chat_draft(chat: ChatTemplate, messages: Messages, remarks: Sequence[Remark] = ()) -> Draft:
    index = last_user(messages)

    def wrap(content: str) -> str:
        assert index is not None
        shorter = [*messages]
        shorter[index] = {**messages[index], "content": content}
        return chat.render(shorter)

    content = None if index is None else messages[index]["content"]
    return Draft(chat.render(messages), content, wrap, remarks)


def _holds_token_ids(data_type: pa.DataType) -> bool:
    types = pa.types
    is_list = types.is_list(data_type) or types.is_fixed_size_list(data_type)
    if not is_list:
        return False
    return bool(types.is_integer(data_type.value_type) or types.is_null(data_type.value_type))
