"""What is a file's name where a template may be, and the text of a chat template's file, which
becomes the setting.

What is computed is decided by the text, wherever the file is later. Must not know: names of
templates, tokenizers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from batchinfer.config.job_file import relative_to

_MAX_BYTES = 1 << 20
_ENDINGS = (".j2", ".jinja", ".jinja2", ".tmpl", ".tpl", ".template", ".prompt", ".txt", ".md")
_LOCATION = re.compile(r"(\w+://|~?/|\.\.?/)\S+")


def text_of(template: str) -> str:
    """The text of the file that `template` names; itself, where it can only be a text or a name.

    Raises ValueError for a file that cannot be read or holds no text.
    """
    if not is_path(template):
        return template
    template = template.strip()
    path = Path(template).expanduser()
    try:
        if not path.is_file():
            raise ValueError(f"there is no file {template} ({relative_to()})")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the file {template} cannot be read: {error.strerror}") from None
    if len(content) > _MAX_BYTES or not content.strip():
        what = "larger than 1 MiB" if content.strip() else "empty"
        raise ValueError(f"the file {template} is {what}: not a chat template")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {template} is not UTF-8: {error.reason}") from None


def is_path(text: str) -> bool:
    """Whether a template can only be a file's name: a template says what to do in braces."""
    text = text.strip()
    if "{" in text or "\n" in text or not text:
        return False
    is_word = not re.search(r"\s", text)
    if _LOCATION.fullmatch(text) or (is_word and text.lower().endswith(_ENDINGS)):
        return True
    if text.isidentifier():  # a name, wherever the command is started
        return False
    return os.path.isfile(text)  # noqa: PTH113 (no error for a text that is too long)
