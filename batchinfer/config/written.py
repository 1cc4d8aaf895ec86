"""Settings -> the text of a job file, for people.

Must not know: jobs. Invariant: what is written reads as what was given, whatever it is.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from batchinfer.config.yaml12 import load_yaml
from batchinfer.errors import ConfigError, printable

#: Texts that nobody puts in quotes, if they read as text.
_PLAIN = re.compile(r"[A-Za-z0-9_./~*-]+")
_WIDTH = 100


def written(settings: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
    """YAML of JSON data. `notes`: by dotted key, a comment above it."""
    return "".join(f"{line}\n" for line in _mapping(settings, "", "", notes or {}))


def _mapping(
    settings: Mapping[str, Any], prefix: str, indent: str, notes: Mapping[str, str]
) -> Iterator[str]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if note := notes.get(key):
            yield from textwrap.wrap(
                printable(note),
                _WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
            )
        yield from _entry(f"{indent}{_text(name)}:", value, f"{key}.", f"{indent}  ", notes)


def _entry(
    start: str, value: Any, prefix: str, indent: str, notes: Mapping[str, str]
) -> Iterator[str]:
    """What follows `start`, a key or a dash."""
    if isinstance(value, Mapping) and value:
        yield start
        yield from _mapping(value, prefix, indent, notes)
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | list) for v in value):
        yield start
        for entry in value:
            first, *rest = _entry("", entry, prefix, f"{indent}  ", notes)
            if first:
                yield f"{indent}-{first}"
            else:  # a mapping, whose first line may be a comment
                yield f"{indent}- {rest[0].lstrip()}"
                rest = rest[1:]
            yield from rest
    elif isinstance(value, list | tuple):
        yield f"{start} [{', '.join(map(_scalar, value))}]"
    else:
        yield f"{start} {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    return "{}" if isinstance(value, Mapping) else json.dumps(value)


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and _is_text(value):
        return value
    quoted: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)
    return quoted.removesuffix("\n")


def _is_text(value: str) -> bool:
    """Whether it reads as itself without quotes: here, and where YAML 1.1 is read."""
    try:
        is_here = load_yaml(f"a: {value}", "text").data == {"a": value}
    except ConfigError:  # such as *, an alias
        return False
    return is_here and yaml.safe_dump(value, width=math.inf).splitlines()[0] == value
