"""Where the prompt of a row comes from.

Must not know: templates' syntax, tokenizers, rows.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from batchinfer.config.section import (
    Section,
    exactly_one,
    key_error,
    reads_column,
    require_exactly_one,
)
from batchinfer.config.template_file import text_of
from batchinfer.config.values import FrozenMapping, Text, Tuple

PROMPT_KINDS = ("column", "template", "messages", "messages_column", "token_ids_column")
# Of a chat template's variables, those that cannot come from prompt.chat_template_kwargs.
_TAKEN_KWARGS = {
    "messages": "the conversation comes from prompt.messages or prompt.messages_column",
    "conversations": "the conversation comes from prompt.messages or prompt.messages_column",
    "chat_template": "give the template as prompt.chat_template",
    "continue_final_message": "set prompt.continue_final_message: true",
    "return_assistant_tokens_mask": "nothing here is trained",
}


class Message(Section):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks."
    )
    content: str = Field(description="Jinja2 template of the text; variables are input columns.")


class PromptSettings(Section):
    """Where the prompt of a row comes from."""

    model_config = ConfigDict(json_schema_extra=exactly_one(PROMPT_KINDS))

    column: Text | None = Field(
        default=None,
        description="Column whose text is the prompt, unchanged.",
        json_schema_extra=reads_column("string", "the prompt, unchanged"),
    )
    template: Text | None = Field(
        default=None,
        description="Jinja2 template of a plain prompt; variables are input columns.",
        json_schema_extra=reads_column("any", "the columns that the template names"),
    )
    messages: Annotated[tuple[Message, ...], Tuple] | None = Field(
        default=None,
        description="Chat messages; rendered with the chat template.",
        min_length=1,
        json_schema_extra=reads_column("any", "the columns that the messages' templates name"),
    )
    messages_column: Text | None = Field(
        default=None,
        description="Column with a list of {role, content}; rendered with the chat template.",
        json_schema_extra=reads_column(
            "list<struct<role: string, content: string>> or string",
            "the chat, or the same as JSON text",
        ),
    )
    token_ids_column: Text | None = Field(
        default=None,
        description="Column with a list of token ids, used unchanged.",
        json_schema_extra=reads_column("list<integer>", "the prompt's token ids"),
    )
    on_too_long: Literal["error", "truncate_left", "truncate_right"] = Field(
        default="error",
        description="When prompt + max_tokens exceed max_model_len: an error in the row's result, "
        "or cut the start (left) or the end (right) of the row's text.",
    )
    continue_final_message: bool = Field(
        default=False,
        description="The last message, the assistant's, is the beginning of the answer: the model "
        "continues it instead of beginning another.",
    )
    chat_template: Text | None = Field(
        default=None,
        description="Chat template: its name, a local file, or its Jinja2 text; null means the "
        "tokenizer's own.",
    )
    chat_template_kwargs: FrozenMapping = Field(
        default_factory=dict,
        validate_default=True,
        description="Extra variables of the chat template, such as enable_thinking.",
    )

    @field_validator("chat_template")
    @classmethod
    def _text_of_file(cls, template: str | None) -> str | None:
        return None if template is None else text_of(template)

    @model_validator(mode="after")
    def _check(self) -> PromptSettings:
        require_exactly_one(self, PROMPT_KINDS)
        if self.messages is None and self.messages_column is None:
            for key in ("continue_final_message", "chat_template", "chat_template_kwargs"):
                if getattr(self, key):
                    raise key_error(key, "only applies to messages and messages_column")
        if self.continue_final_message and self.messages and self.messages[-1].role != "assistant":
            raise key_error(
                "continue_final_message", "needs a last message that is the assistant's"
            )
        for name, instead in _TAKEN_KWARGS.items():
            if name in self.chat_template_kwargs:
                raise key_error("chat_template_kwargs", f"cannot set {name}: {instead}")
        return self
