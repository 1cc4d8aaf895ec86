"""Input paths as text: the folder before the first wildcard, and which keys below it are meant.

`*`, `?` and `[…]` stay inside one path component, `**` crosses folders. A component that starts
with `_` or `.` (unfinished and private files of many tools) is matched only by a pattern component
that starts with the same character. Must not know: what is stored; only `matches` asks where local
links lead, so that an output is recognised under any name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.storage import is_s3, join_url

SUFFIX = ".parquet"

_WILDCARD = re.compile(r"[*?\[]")
_NOT_HIDDEN = r"(?![._])"
_ANY_FOLDERS = rf"(?:{_NOT_HIDDEN}[^/]+/)*"


@dataclass(frozen=True, slots=True)
class Pattern:
    """One input path with wildcards. `regex` matches keys below `root` in full."""

    root: str
    literal_prefix: str  # every matching key starts with it
    is_recursive: bool  # whether a key may lie in a folder below the root
    regex: re.Pattern[str]


def has_wildcard(path: str) -> bool:
    return _WILDCARD.search(path) is not None


def parse_pattern(path: str) -> Pattern:
    """Split a path with wildcards. Raises ConfigError for one that cannot match."""
    start = len("s3://") if is_s3(path) else 0
    cut = path.rfind("/", start, _first_wildcard(path)) + 1
    if start and cut <= start:
        raise ConfigError(f"input.path {path}: the bucket's name cannot have wildcards")
    root = (path[:cut].rstrip("/") or "/") if cut else "."
    components = [part for part in path[cut:].split("/") if part not in ("", ".")]
    if ".." in components:
        raise ConfigError(f"input.path {path}: `..` cannot follow a wildcard")
    return Pattern(
        root,
        path[cut : _first_wildcard(path)],
        len(components) > 1 or components == ["**"],
        re.compile("".join(_translate(components, path)), re.DOTALL),
    )


def folder_regex() -> re.Pattern[str]:
    """The keys that a plain folder stands for."""
    return re.compile(rf"{_ANY_FOLDERS}{_NOT_HIDDEN}[^/]*{re.escape(SUFFIX)}", re.DOTALL)


def matches(paths: Sequence[str], url: str) -> bool:
    """Whether a file at `url` (there or not) would be read as input by `paths`."""
    folder, _, name = url.rpartition("/")
    real_url = url if is_s3(url) else join_url(_real(folder or "/"), name)
    return any(_matches_one(path, real_url) for path in paths)


def _matches_one(path: str, url: str) -> bool:
    if is_s3(path) != is_s3(url):
        return False
    root, regex = _rooted(path)
    if url == root:
        return url.endswith(SUFFIX)
    below = root.rstrip("/") + "/"
    return url.startswith(below) and regex.fullmatch(url[len(below) :]) is not None


@lru_cache(maxsize=256)
def _rooted(path: str) -> tuple[str, re.Pattern[str]]:
    if has_wildcard(path):
        pattern = parse_pattern(path)
        root, regex = pattern.root, pattern.regex
    else:
        root, regex = path.rstrip("/") or "/", folder_regex()
    return (root if is_s3(root) else _real(root)), regex


def _real(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


def _first_wildcard(path: str) -> int:
    found = _WILDCARD.search(path)
    assert found is not None
    return found.start()


def _translate(components: Sequence[str], path: str) -> list[str]:
    pieces = []
    for index, component in enumerate(components):
        is_last = index == len(components) - 1
        if component == "**":
            pieces.append(_ANY_FOLDERS)
            if is_last:
                pieces.append(rf"{_NOT_HIDDEN}[^/]+")
        else:
            pieces.append(_translate_component(component, path))
            if not is_last:
                pieces.append("/")
    return pieces


def _translate_component(component: str, path: str) -> str:
    pieces = [_NOT_HIDDEN] if component[0] in "*?[" else []
    position = 0
    while position < len(component):
        character = component[position]
        position += 1
        if character == "*":
            pieces.append("[^/]*")
        elif character == "?":
            pieces.append("[^/]")
        elif character == "[":
            # A bracket right after the opening (or its !) is a member of the set, as in the shell.
            end = component.find("]", position + 1 + (component[position : position + 1] == "!"))
            if end < 0:
                raise ConfigError(
                    f"input.path {path}: `[` without `]`; write [[] for the character"
                )
            pieces.append(_translate_set(component[position:end], path))
            position = end + 1
        else:
            pieces.append(re.escape(character))
    return "".join(pieces)


def _translate_set(members: str, path: str) -> str:
    negation = "^" if members[0] in "!^" and len(members) > 1 else ""
    members = members[len(negation) :].replace("\\", r"\\").replace("[", r"\[")
    members = members.replace("]", r"\]").replace("^", r"\^")
    try:
        re.compile(f"[{members}]")
    except re.error as error:
        raise ConfigError(f"input.path {path}: [{members}] is not a set: {error}") from None
    return f"(?!/)[{negation}{members}]"
