"""Conversations from a column: lists of messages in Arrow's types, or JSON text of one.

Must not know: chat templates, tokens. Invariants: role and content of each message are text; a key
that Arrow's struct type has and a message does not is absent, at any depth, so that both forms of
one conversation are equal; what a JSON text says (a null in arguments, too) stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from batchinfer.errors import RowError
from batchinfer.prompt.numbers import readable_reason
from batchinfer.prompt.values import column_values

Messages = list[dict[str, Any]]

_WANTED = "a list of messages {role, content}, or JSON text of one"
_TEXT_PARTS = ("text", "input_text", "output_text")


def type_problem(data_type: pa.DataType) -> str | None:
    """Why no value of a column of this type can be a conversation; None if one can."""
    types = pa.types
    if types.is_string(data_type) or types.is_null(data_type):
        return None
    if types.is_struct(data_type):
        if inner := _path_to_messages(data_type):
            return f"is a struct with messages in its field {inner}: make that a column of its own"
        return f"is a struct with the keys {_names(data_type)}, not {_WANTED}"
    if not _is_list(data_type):
        return f"is {data_type}, not {_WANTED}"
    message = data_type.value_type
    if types.is_map(message):
        item = message.item_type
        can_be_role = types.is_string(item) or types.is_null(item)
        return None if can_be_role else f"has messages whose values are {item}, not text"
    if not types.is_struct(message):
        return f"is {data_type}, not {_WANTED}"
    names = [field.name for field in message]
    if "role" not in names or not {"content", "tool_calls"}.intersection(names):
        return f"has messages with the keys {_names(message)}; they need role and content"
    if not types.is_string(role := message.field("role").type):
        return f"has messages whose role is {role}, not text"
    # Bytes in another key are errors of the rows that have some: often no row has.
    if "content" not in names:
        return None
    return _content_problem(message.field("content").type)


def message_values(column: pa.ChunkedArray) -> list[Any]:
    """One entry for each row: a list, JSON text, None (null) or a RowError."""
    values = column_values(column)
    given = _given(column.type)
    if given is None:
        return values
    return [v if v is None or isinstance(v, RowError) else given(v) for v in values]


def parse_messages(value: Any) -> Messages:
    """A conversation from a value of `message_values`. Raises RowError."""
    if isinstance(value, str):
        value = _json(value, "the messages are")
    if isinstance(value, dict):
        raise RowError(
            "invalid_prompt",
            f"the messages are an object with the keys {', '.join(map(str, value))}, not a list: "
            "write its list of messages into the column",
        )
    if not isinstance(value, list) or not value:
        raise RowError("invalid_prompt", "the messages are not a list of at least one message")
    return [_parse_message(message, number) for number, message in enumerate(value)]


def last_user(messages: Messages) -> int | None:
    """Index of the last message of the user."""
    of_user = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return of_user[-1] if of_user else None


def _parse_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError("invalid_prompt", f"message {number} is not a mapping of role and content")
    parsed = {key: value for key, value in message.items() if value is not None}
    if calls := parsed.pop("tool_calls", None):
        parsed["tool_calls"] = _parse_tool_calls(calls, number)
    content = parsed.get("content")
    if isinstance(content, list):
        parsed["content"] = "\n".join(
            _content_text(part, f"message {number}: part {index} of the content")
            for index, part in enumerate(content)
        )
    elif content is None and ("tool_calls" in parsed or parsed.get("function_call")):
        parsed["content"] = ""  # a template that joins texts cannot do it with a null
    for key in ("role", "content"):
        if not isinstance(parsed.get(key), str):
            if key not in message:
                keys = ", ".join(map(str, message)) or "no keys"
                raise RowError(
                    "invalid_prompt", f"message {number} has {keys}; it needs role and content"
                )
            kind = "null" if message[key] is None else type(message[key]).__name__
            raise RowError("invalid_prompt", f"message {number}: {key} must be text, is {kind}")
    if not parsed["role"]:
        raise RowError("invalid_prompt", f"message {number}: role is empty")
    return parsed


def _content_text(part: Any, name: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("invalid_prompt", f"{name} is not a mapping of type and text")
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS:
        raise RowError("invalid_prompt", f"{name} is of type {kind!r}: only text can be read")
    if not isinstance(part.get("text"), str):
        raise RowError("invalid_prompt", f"{name} has no text")
    return str(part["text"])


def _parse_tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = _json(calls, f"message {number}: tool_calls are")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError("invalid_prompt", f"message {number}: tool_calls are not a list of calls")
    return [_with_mapping(call) for call in calls]


def _with_mapping(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as a mapping, which chat templates expect.

    OpenAI's form has them as JSON text; text that is not a JSON object is kept unchanged.
    """
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _with_mapping(function)}
    if "name" not in call:
        return call
    arguments = call.get("arguments")
    if not arguments:
        return {**call, "arguments": {}}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return call


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise RowError(
            "invalid_prompt", f"{what} not valid JSON: {readable_reason(error)}"
        ) from None
    except RecursionError:
        raise RowError("invalid_prompt", f"{what} nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json takes the last of two equal keys: one message can say two things."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def _given(data_type: pa.DataType) -> Callable[[Any], Any] | None:
    """A function that drops the nulls that a struct type adds to a value; None without a struct."""
    types = pa.types
    if types.is_struct(data_type):
        fields = {field.name: _given(field.type) for field in data_type}
        nested = {name: given for name, given in fields.items() if given is not None}

        def of_struct(value: dict[str, Any]) -> dict[str, Any]:
            kept = {name: entry for name, entry in value.items() if entry is not None}
            for name, given in nested.items():
                if name in kept:
                    kept[name] = given(kept[name])
            return kept

        return of_struct
    if types.is_map(data_type):
        of_item = _given(data_type.item_type)
        return lambda value: {
            key: item if item is None or of_item is None else of_item(item)
            for key, item in (value.items() if isinstance(value, dict) else value)
        }
    if _is_list(data_type):
        of_entry = _given(data_type.value_type)
        if of_entry is None:
            return None
        return lambda value: [None if entry is None else of_entry(entry) for entry in value]
    return None


def _content_problem(content: pa.DataType) -> str | None:
    types = pa.types
    if types.is_string(content) or types.is_null(content):
        return None
    wanted = "text or a list of parts {type: text, text}"
    part = content.value_type if _is_list(content) else None
    if part is None:
        return f"has messages whose content is {content}, not {wanted}"
    if types.is_struct(part) and "text" not in [field.name for field in part]:
        return f"has messages whose content has parts with the keys {_names(part)}, not {wanted}"
    can_be_text = (types.is_struct, types.is_map, types.is_string, types.is_null)
    if not any(is_right(part) for is_right in can_be_text):
        return f"has messages whose content is {content}, not {wanted}"
    return None


def _path_to_messages(struct: pa.DataType) -> str | None:
    """The first field that could be a conversation by itself, dotted."""
    for field in struct:
        if pa.types.is_struct(field.type):
            if inner := _path_to_messages(field.type):
                return f"{field.name}.{inner}"
        elif _is_list(field.type) and type_problem(field.type) is None:
            return str(field.name)
    return None


def _is_list(data_type: pa.DataType) -> bool:
    types = pa.types
    kinds = (
        types.is_list,
        types.is_large_list,
        types.is_list_view,
        types.is_large_list_view,
        types.is_fixed_size_list,
    )
    return any(is_kind(data_type) for is_kind in kinds)


def _names(struct: pa.DataType) -> str:
    return ", ".join(field.name for field in struct) or "none"
