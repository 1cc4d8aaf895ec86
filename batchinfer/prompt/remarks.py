"""Oddities of a conversation that are not errors: reported once in a run, by whoever knows its row.

Must not know: rows, logs. What a chat template leaves out is found by asking it: a role's first
messages are rendered again with a mark as their content.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from batchinfer.errors import RowError
from batchinfer.prompt.messages import Messages

#: Roles that chat templates are written for; one may know others by name.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_MARK = "Qv7mark7vQ"
_MAX_NAMED = 5
_MAX_ROLES = 1000  # that are looked at: names of speakers can be without end

Remark = tuple[str, str]  # kind, what it is about

#: Of each kind, the sentence with {names}: what the remarks of that kind are about.
_SENTENCES = {
    "left_out": "the chat template leaves {names} out of the prompt",
    "unknown_role": "messages have the role {names}, neither a common one "
    f"({', '.join(KNOWN_ROLES)}) nor named in the chat template: it is passed on unchanged, "
    "and means nothing to a model that was not trained on it",
    "last_is_assistant": "the last message is the assistant's: it is closed like any other, and "
    "the model begins another answer after it. To continue it, set "
    "prompt.continue_final_message: true",
}


class Remarks:
    """What there is to say about conversations of one job. May be used from several threads."""

    def __init__(
        self, render: Callable[[Messages], str], template: str, *, continues: bool
    ) -> None:
        """`render` raises RowError; `template` is the chat template's text.

        `continues`: the last message is the beginning of the answer.
        """
        self._render = render
        self._template = template
        self._continues = continues
        self._has_tool_calls = "tool_calls" in template
        self._is_written: dict[str, bool] = {}

    def of(self, messages: Messages) -> list[Remark]:
        """All remarks on one conversation."""
        found: list[Remark] = []
        for role in dict.fromkeys(message["role"] for message in messages):
            if role not in self._is_written and len(self._is_written) < _MAX_ROLES:
                self._is_written[role] = self._writes(messages, role)
            if not self._is_written.get(role, True):
                found.append(("left_out", f"messages of the role {role!r}"))
            elif role not in KNOWN_ROLES and not self._names(role):
                found.append(("unknown_role", repr(role)))
        if not self._has_tool_calls and any("tool_calls" in m for m in messages):
            found.append(("left_out", "tool_calls"))
        if messages[-1]["role"] == "assistant" and not self._continues:
            found.append(("last_is_assistant", ""))
        return found

    def is_user_left_out(self, messages: Messages) -> bool:
        """Whether nothing that the user says gets into the prompt; asked after `of`."""
        if self._is_written.get("user", True):
            return False
        indices = [i for i, message in enumerate(messages) if message["role"] == "user"]
        return bool(indices) and self.is_left_out(messages, indices)

    def is_left_out(self, messages: Messages, indices: Collection[int]) -> bool:
        """Whether the prompt is the same whatever these messages say. If it is refused: no."""
        try:
            one, other = (
                self._render(
                    [{**m, "content": text} if i in indices else m for i, m in enumerate(messages)]
                )
                for text in (_MARK, "another")
            )
        except RowError:
            return False
        return one == other

    def _names(self, role: str) -> bool:
        return f"'{role}'" in self._template or f'"{role}"' in self._template

    def _writes(self, messages: Messages, role: str) -> bool:
        """Whether any message of this role gets into the prompt. If it is refused: yes."""
        marked = [{**m, "content": _MARK} if m["role"] == role else m for m in messages]
        try:
            return _MARK.lower() in self._render(marked).lower()
        except RowError:
            return True


def sentence(kind: str, names: Collection[str]) -> str:
    """The warning about remarks of one kind."""
    named = ", ".join(list(names)[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return _SENTENCES[kind].format(names=named + more)
