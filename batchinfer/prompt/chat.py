"""Conversations to text with the tokenizer's own chat template.

Must not know: rows, tokens. The template is compiled once (by transformers' helper, which gives it
the functions that chat templates of models expect); what it does to one conversation stays there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.messages import Messages
from batchinfer.prompt.render import template_error
from batchinfer.prompt.wording import refuse_chat_template

_KEY = "prompt.chat_template"
_MARK = "Qv7mark7vQ"


class ChatTemplate:
    """A chat template with its fixed arguments. `source` is its text."""

    def __init__(self, tokenizer: Any, template: str | None, arguments: Mapping[str, Any]) -> None:
        """`template` None: the tokenizer's own. Raises ConfigError if there is no valid one."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            source = tokenizer.get_chat_template(template)
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template: give one as {_KEY}, "
                "or use prompt.template for a model that does not chat"
            ) from error
        self.source: str = source
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
        refuse_chat_template(source, _KEY if template else "the tokenizer's chat template")
        self._takes_only_parts = False
        self._takes_only_parts = not self._writes(_MARK) and self._writes(_as_parts(_MARK))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: Messages) -> str:
        """Raises RowError if the template refuses the conversation."""
        if self._takes_only_parts:
            messages = [
                {**message, "content": _as_parts(message["content"])} for message in messages
            ]
        try:
            rendered: str = self._render([messages], **self._arguments)[0][0]
        except Exception as error:  # the row's edge: a template can fail in any way Python can
            raise template_error("chat template", error) from error
        return rendered

    def _writes(self, content: Any) -> bool:
        """Whether a user's content of this form gets into the prompt."""
        try:
            return _MARK in self.render([{"role": "user", "content": content}])
        except RowError:
            return False


def _as_parts(content: str) -> list[dict[str, str]]:
    """The form of templates of models that see: from a text they would write nothing."""
    return [{"type": "text", "text": content}]
