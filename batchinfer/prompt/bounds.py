"""How much a template may make of short values, asked before it is made.

One call into Python that makes gigabytes of text of `'%2000000000d' % n`, or of a list that holds
itself twice forty times over, takes the machine's memory, and no signal ends it. Must not know:
jinja's environment. Each check raises OverflowError, which becomes the row's error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

#: Of what a template makes for one row; no model takes a tenth of it.
MAX_CHARS = 2**27
#: Of a list: each takes eight bytes, at least.
MAX_ENTRIES = 2**24
#: Lists that `slice` makes and entries that `batch` fills up.
MAX_PIECES = 1_000_000
#: Entries that one call copies from list to list.
_MAX_COPIED = 2**30
_TEXTS = (str, bytes, bytearray)
_LISTS = (list, tuple)
_CONTAINERS = (*_LISTS, dict)
_CONVERSION = re.compile(
    r"%(?:\([^)]*\))?[#0\- +]*(?P<width>\*|\d*)(?:\.(?P<precision>\*|\d*))?[hlL]?[^\d.]"
)
_DIGITS = re.compile(r"\d+")


class Size(NamedTuple):
    """Of a value as text, at least: `chars` without what lies between the entries."""

    chars: int
    entries: int
    depth: int


def check_chars(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise OverflowError(f"the text has more than {MAX_CHARS} characters")


def check_entries(num_entries: int) -> None:
    if num_entries > MAX_ENTRIES:
        raise OverflowError(f"a list has more than {MAX_ENTRIES} entries")


def check_copied(num_entries: int) -> None:
    if num_entries > _MAX_COPIED:
        raise OverflowError(f"lists of more than {_MAX_COPIED} entries are copied")


def check_made(value: Any) -> Any:
    """`value`, which some call has made."""
    if isinstance(value, _TEXTS):
        check_chars(len(value))
    elif isinstance(value, _LISTS):
        check_entries(len(value))
    return value


def check_widths(arguments: Iterable[Any], most: int = MAX_CHARS) -> None:
    """Text is filled up to them, by `center` and others."""
    for argument in arguments:
        if isinstance(argument, int) and argument > most:
            raise OverflowError(f"{argument} is more than {most}")


def check_printable(*values: Any) -> None:
    """Before values become one text: a list that holds another one twice prints it twice."""
    if len(values) == 1 and not isinstance(values[0], _CONTAINERS):
        return  # one that is text already, or as short as a number
    check_chars(sum(size_of(value).chars for value in values))


def size_of(value: Any) -> Size:
    """Each list is looked at once, however often it occurs."""
    if isinstance(value, _TEXTS):
        return Size(len(value), 1, 0)
    return _size(value, {}) if isinstance(value, _CONTAINERS) else Size(1, 1, 0)


def _size(value: Any, known: dict[int, Size]) -> Size:
    if not isinstance(value, _CONTAINERS):
        return size_of(value)
    if (found := known.get(id(value))) is not None:
        return found
    chars = entries = depth = 0
    inner = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    for entry in inner:
        size = _size(entry, known)
        chars, entries = chars + 1 + size.chars, entries + size.entries
        depth = max(depth, size.depth)
    known[id(value)] = found = Size(chars + 1, entries + 1, depth + 1)
    return found


def check_operation_on_text(operator: str, left: Any, right: Any) -> None:
    """`*`, `+` and `%`, where one side is a text or a list."""
    if operator == "*":
        long, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int) and isinstance(long, _TEXTS):
            check_chars(len(long) * times)
        elif isinstance(times, int) and isinstance(long, _LISTS):
            check_entries(len(long) * times)
    elif operator == "+" and isinstance(left, _TEXTS) and isinstance(right, _TEXTS):
        check_chars(len(left) + len(right))
    elif operator == "+" and isinstance(left, _LISTS) and isinstance(right, _LISTS):
        check_entries(len(left) + len(right))
    elif operator == "%" and isinstance(left, _TEXTS):
        check_percent(left if isinstance(left, str) else left.decode("latin-1"), right)


def check_percent(text: str, arguments: Any) -> None:
    """`text % arguments`. Each conversion may print the longest of them."""
    given = arguments if isinstance(arguments, tuple) else (arguments,)
    if isinstance(arguments, Mapping):
        given = (*given, *arguments.values())
    longest = max((size_of(value).chars for value in given), default=0)
    num_chars = len(text)
    for found in _CONVERSION.finditer(text):
        for number in (found["width"], found["precision"]):
            if number == "*":
                check_widths(given)
                longest = max([longest, *(abs(n) for n in given if isinstance(n, int))])
            elif number:
                check_width_in(number)
                num_chars += int(number)
        num_chars += longest if "%%" not in found[0] else 0
    check_chars(num_chars)


def check_width_in(spec: str) -> None:
    """The numbers in the specification of a format."""
    for digits in _DIGITS.findall(spec):
        if len(digits) > len(str(MAX_CHARS)) or int(digits) > MAX_CHARS:
            raise OverflowError(f"{digits[:20]} is more than {MAX_CHARS}")


def check_replace(text: str, old: Any, new: Any) -> None:
    times = text.count(str(old)) if len(str(old)) <= len(text) else 0
    check_chars(len(text) + times * max(0, len(str(new)) - len(str(old))))


def check_split(text: str, separator: Any) -> None:
    """An entry of a list takes fifty bytes and more."""
    is_given = isinstance(separator, str) and separator
    check_entries(text.count(separator) if is_given else len(text) // 2)


def check_join(separator: Any, values: list[Any]) -> None:
    between = len(separator) * (len(values) - 1) if isinstance(separator, _TEXTS) else 0
    check_chars(between + sum(size_of(value).chars for value in values))


def check_translate(text: str, table: Any) -> None:
    values = table.values() if isinstance(table, Mapping) else ()
    longest = max((len(value) for value in values if isinstance(value, str)), default=1)
    check_chars(len(text) * max(1, longest))


def check_indent(text: str, width: Any) -> None:
    if isinstance(width, int | str):
        per_line = len(width) if isinstance(width, str) else max(0, width)
        check_chars(len(text) + per_line * (text.count("\n") + 1))


def check_wrapped(text: str, width: Any, wrap: Any) -> None:
    if isinstance(wrap, str) and len(wrap) > 1:
        num_lines = len(text.split()) + len(text) // max(1, int(width)) + text.count("\n") + 1
        check_chars(len(text) + num_lines * len(wrap))


def check_json(value: Any, indent: Any) -> None:
    size = size_of(value)
    per_entry = len(indent) if isinstance(indent, str) else max(0, int(indent or 0))
    check_chars(size.chars + per_entry * size.entries * size.depth)
