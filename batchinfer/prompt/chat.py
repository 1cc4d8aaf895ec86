"""Conversations to text with a chat template: the tokenizer's own, one by name, or a given text.

Must not know: rows, tokens. The template is compiled once; what it does to one conversation stays
there.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.chat_rendering import ChatRenderer
from batchinfer.prompt.formats import FORMATS
from batchinfer.prompt.messages import Messages
from batchinfer.prompt.numbers import readable_reason
from batchinfer.prompt.render import has_address, refuse_addresses, template_error
from batchinfer.prompt.wording import refuse_chat_template

logger = logging.getLogger("batchinfer.prompt")

_KEY = "prompt.chat_template"
_MARK = "Qv7mark7vQ"


class ChatTemplate:
    """A chat template with its fixed arguments. `source` is its text."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        arguments: Mapping[str, Any],
        *,
        continues: bool = False,
    ) -> None:
        """`template`: its text, or a name: one of the tokenizer's, else one of `FORMATS`. None: the
        tokenizer's own. `continues`: the last message is left open.

        Raises ConfigError if there is no valid template.
        """
        self.source = _source(tokenizer, template, arguments.get("tools"))
        self.words = frozenset(re.findall(r"\w+", self.source))  # those of its variables, too
        _warn_of_unread(arguments, self.words)
        key = _KEY if template else "the tokenizer's chat template"
        given = {
            **tokenizer.special_tokens_map,
            "add_generation_prompt": not continues,
            **arguments,
        }
        try:
            self._renderer = ChatRenderer(self.source, is_left_open=continues, **given)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{key}, line {error.lineno}: {error.message}") from None
        except TemplateError as error:
            raise ConfigError(f"{key}: {error.message}") from None
        except TypeError as error:  # tools, documents
            raise ConfigError(f"prompt.chat_template_kwargs: {error}") from error
        except RecursionError:
            raise ConfigError(f"{key}: the template is nested too deeply") from None
        except Exception as error:  # Python's own bounds: nested loops, digits of a number
            raise ConfigError(f"{key}: {readable_reason(error)}") from None
        refuse_chat_template(self.source, key)
        self._has_address = has_address(self.source)
        self._takes_only_parts = False
        self._takes_only_parts = not self._writes(_MARK) and self._writes(_as_parts(_MARK))

    def render(self, messages: Messages) -> str:
        """Raises RowError if the template refuses the conversation."""
        if self._takes_only_parts:
            messages = [
                {**message, "content": _as_parts(message["content"])} for message in messages
            ]
        try:
            rendered = self._renderer.render(messages)
        except Exception as error:  # the row's edge: a template can fail in any way Python can
            raise template_error("chat template", error) from error
        if not self._has_address:
            refuse_addresses(rendered, [messages], "chat template")
        return rendered

    def _writes(self, content: Any) -> bool:
        """Whether a user's content of this form gets into the prompt."""
        try:
            return _MARK in self.render([{"role": "user", "content": content}])
        except RowError:
            return False


def _source(tokenizer: Any, template: str | None, tools: Any) -> str:
    """The text of a template: as given, or by a name, or the tokenizer's own."""
    if template is not None and is_name(template):
        return _named(tokenizer, template.strip())
    try:
        return str(tokenizer.get_chat_template(template, tools=tools))
    except (ValueError, AttributeError) as error:
        of_tokenizer = getattr(tokenizer, "chat_template", None)
        name = getattr(tokenizer, "name_or_path", "")
        if isinstance(of_tokenizer, dict):
            raise ConfigError(
                f"the tokenizer {name} has several chat templates and no default: give one of "
                f"{', '.join(sorted(of_tokenizer))} as {_KEY}"
            ) from error
        if of_processor := _of_processor(Path(name)):
            return of_processor
        raise ConfigError(
            f"the tokenizer {name} has no chat template: give one as {_KEY}, as a file, as text or "
            f"by name ({', '.join(FORMATS)}), or use prompt.template for a model that does not chat"
        ) from error


def is_name(template: str) -> bool:
    """Whether it can only be the name of a template: one word, of which none could be made."""
    return template.strip().isidentifier()


def _named(tokenizer: Any, name: str) -> str:
    own = getattr(tokenizer, "chat_template", None)
    known = own if isinstance(own, dict) else {}
    if name in known:
        return str(known[name])
    if name not in FORMATS:
        close = difflib.get_close_matches(name, [*known, *FORMATS], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        if Path(name).is_file():
            hint = f" (the file of that name is ./{name})"
        of_tokenizer = f"the tokenizer has {', '.join(sorted(known)) or 'no named one'}"
        raise ConfigError(
            f"{_KEY}: there is no chat template {name!r}{hint}: {of_tokenizer}, and there are "
            f"{', '.join(FORMATS)}"
        )
    vocabulary = tokenizer.get_vocab()
    if missing := [mark for mark in FORMATS[name].marks if mark not in vocabulary]:
        logger.warning(
            "%s: %s writes %s, which this tokenizer does not have as tokens: the model sees the "
            "letters, and was probably not trained on that format",
            _KEY,
            name,
            " and ".join(missing),
        )
    if own and own != FORMATS[name].template:
        logger.info("%s: %s is used in place of the tokenizer's own", _KEY, name)
    return FORMATS[name].template


def _of_processor(folder: Path) -> str | None:
    """Models that see have theirs in a file of their own, which tokenizers do not read."""
    try:
        found = json.loads((folder / "chat_template.json").read_bytes())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _warn_of_unread(arguments: Mapping[str, Any], words: Collection[str]) -> None:
    for name in arguments:
        if name not in words:
            close = difflib.get_close_matches(name, words, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            logger.warning(
                "prompt.chat_template_kwargs: the chat template does not read %r%s", name, hint
            )


def _as_parts(content: str) -> list[dict[str, str]]:
    """The form of templates of models that see: from a text they would write nothing."""
    return [{"type": "text", "text": content}]
