"""Names that people read: labels, families, titles. They go to terminals, HTML and SVG.

Must not know: what is called so.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from batchinfer.config.values import Text, shown

#: Control characters, separators of lines, what turns the direction of writing around, surrogates
#: and noncharacters: a terminal obeys some, and XML 1.0 (2.2, Char) has no place for others.
_UNPRINTABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def check_name(value: str) -> str:
    """The name itself. Raises ValueError, with a sentence, for what is not a line of text."""
    if (found := _UNPRINTABLE.search(value)) is not None:
        raise ValueError(
            f"must be one line without control characters, has U+{ord(found[0]):04X} at character "
            f"{found.start() + 1}"
        )
    if not value.strip():
        raise ValueError("must not be blank")
    if value != value.strip():
        raise ValueError(f"must not begin or end with a space, got {shown(value)}")
    return value


def printable(text: str) -> str:
    """With U+FFFD for each character that `check_name` would refuse."""
    return _UNPRINTABLE.sub("\ufffd", text)


def shortened(text: str, max_chars: int) -> str:
    """Without its middle: names of one kind differ at the end as often as at the start."""
    if len(text) <= max_chars:
        return text
    head = (max_chars - 1) // 2
    return f"{text[:head]}…{text[len(text) - (max_chars - 1 - head) :]}"


Name = Annotated[Text, AfterValidator(check_name)]
