"""Conversations to text with the tokenizer's own chat template.

Must not know: rows, tokens. The template is compiled once (by transformers' helper, which gives it
the functions that chat templates of models expect); what it does to one conversation stays there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.render import template_error

Messages = list[dict[str, Any]]

_KEY = "prompt.chat_template"
_OWN_ARGUMENTS = frozenset(
    {
        "messages",
        "conversations",
        "chat_template",
        "continue_final_message",
        "return_assistant_tokens_mask",
    }
)


class ChatTemplate:
    """A chat template with its fixed arguments. `sha256` is of its text."""

    def __init__(self, tokenizer: Any, template: str | None, arguments: Mapping[str, Any]) -> None:
        """`template` None: the tokenizer's own. Raises ConfigError if there is no valid one."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if refused := sorted(_OWN_ARGUMENTS.intersection(arguments)):
            raise ConfigError(f"prompt.chat_template_kwargs cannot set {', '.join(refused)}")
        try:
            source = tokenizer.get_chat_template(template)
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template: give one as {_KEY}, "
                "or use prompt.template for a model that does not chat"
            ) from error
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self._render = render_jinja_template
        self._arguments = {
            **tokenizer.special_tokens_map,
            "add_generation_prompt": True,
            **arguments,
            "chat_template": source,
        }
        try:
            self._render([], **self._arguments)  # compiles it
        except TemplateSyntaxError as error:
            raise ConfigError(f"{_KEY}, line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            raise ConfigError(f"{_KEY}: {error.message}") from None
        except (TypeError, ValueError) as error:  # tools, documents
            raise ConfigError(f"prompt.chat_template_kwargs: {error}") from error

    def render(self, messages: Messages) -> str:
        """Raises RowError if the template refuses the conversation."""
        try:
            rendered: str = self._render([messages], **self._arguments)[0][0]
        except Exception as error:  # the row's edge: a template can fail in any way Python can
            raise template_error("chat template", error) from error
        return rendered


def parse_messages(value: Any) -> Messages:
    """A conversation from a list of {role, content}, or from JSON text of one. Raises RowError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("invalid_prompt", f"the messages are not valid JSON: {error}") from None
        except RecursionError:
            raise RowError("invalid_prompt", "the messages are nested too deeply") from None
    if not isinstance(value, list) or not value:
        raise RowError("invalid_prompt", "the messages are not a list of at least one message")
    return [_parse_message(message, number) for number, message in enumerate(value)]


def _parse_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError("invalid_prompt", f"message {number} is not a mapping of role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            kind = type(message.get(key)).__name__ if key in message else "missing"
            raise RowError("invalid_prompt", f"message {number}: {key} must be text, is {kind}")
    if not message["role"]:
        raise RowError("invalid_prompt", f"message {number}: role is empty")
    # In Arrow every message of a column has every key; null means that this one does not.
    return {key: value for key, value in message.items() if value is not None}


def last_user(messages: Messages) -> int | None:
    """Index of the last message of the user."""
    of_user = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return of_user[-1] if of_user else None
