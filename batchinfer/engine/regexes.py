"""What the grammar compilers of engines cannot read of Python's regular expressions.

They match token by token and never look back: xgrammar and LLGuidance refuse look-arounds, word
boundaries and back-references, only once the model is loaded. Must not know: engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from batchinfer.config import StructuredSettings

_PARTS = re.compile(
    r"\\(?P<escape>.)|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<group>\(\?(?:[=!>(#]|<[=!]|P=))", re.DOTALL
)
_OF_GROUPS = {
    **dict.fromkeys(["(?=", "(?!", "(?<=", "(?<!"], "a look-around"),
    "(?>": "an atomic group",
    "(?(": "a conditional group",
    "(?#": "a comment",
    "(?P=": "a back-reference",
}
_WHOLE = "leave it out: the whole completion has to match anyway"


#: Keywords of a schema whose value is not a schema.
_VALUES = frozenset({"const", "default", "enum", "examples"})


def unreadable(structured: StructuredSettings | None) -> str | None:
    """The sentence about a constraint with a regular expression that cannot be read."""
    if structured is None:
        return None
    kind, constraint = structured.constraint
    regexes = [constraint] if kind == "regex" else _patterns(constraint)
    for regex in regexes:
        if problem := regex_problem(regex):
            return f"sampling.structured.{kind}: {regex[:200]}: {problem}"
    return None


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for entry in schema:
            yield from _patterns(entry)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key == "pattern" and isinstance(value, str):
            yield value
        elif key not in _VALUES:
            yield from _patterns(value)


def regex_problem(regex: str) -> str | None:
    """Why no grammar compiler reads it, or reads something else; None if it may."""
    for part in _PARTS.finditer(regex):
        escape, group = part["escape"], part["group"]
        if group is not None:
            return f"{group} is {_OF_GROUPS[group]}, which grammar compilers cannot read"
        if escape is None:
            continue
        if escape in "AZ":  # xgrammar takes the letter for one
            return f"\\{escape} is not what grammar compilers read: {_WHOLE}"
        if escape in "bB":
            return f"\\{escape} is a word boundary, which grammar compilers cannot read"
        if escape in "123456789":
            return f"\\{escape} is a back-reference, which grammar compilers cannot read"
    return None
