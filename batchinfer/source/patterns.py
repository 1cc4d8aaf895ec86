"""Input paths as text: the folder before the first wildcard, and which keys below it are meant.

`*`, `?` and `[…]` stay inside one path component, `**` crosses folders. A component that starts
with `_` or `.` (unfinished and private files of many tools) is matched only by a pattern component
that starts with the same character. A folder that is matched and is named like a file, as Spark and
Dask write them, stands for the files below it. Must not know: what is stored; only `matches` asks
where local links lead, so that an output is recognised under any name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.storage import is_s3, join_url

SUFFIX = ".parquet"

_WILDCARD = re.compile(r"[*?\[]")
_NOT_HIDDEN = r"(?![._])"
_ANY_FOLDERS = rf"(?:{_NOT_HIDDEN}[^/]+/)*"
_FILES_BELOW = rf"{_ANY_FOLDERS}{_NOT_HIDDEN}[^/]*{re.escape(SUFFIX)}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a path means below `root`: a folder's files, or what its wildcards match."""

    root: str
    literal_prefix: str  # every matching key starts with it
    is_recursive: bool  # whether a key may be in a folder below the root
    text: str  # the part with wildcards, empty for a folder
    _named: re.Pattern[str]
    _read: re.Pattern[str]
    _read_if_shown: re.Pattern[str]

    def is_named(self, key: str) -> bool:
        """Whether the wildcards match just this key, of a file or a folder."""
        return self._named.fullmatch(key) is not None

    def is_read(self, key: str) -> bool:
        """Whether the key is meant: matched, or below such a folder that is named like a file."""
        return self._read.fullmatch(key) is not None

    def is_hidden(self, key: str) -> bool:
        """Whether nothing but a name that starts with `_` or `.` keeps the key from being read."""
        return not self.is_read(key) and self._read_if_shown.fullmatch(key) is not None


def has_wildcard(path: str) -> bool:
    return _WILDCARD.search(path) is not None


def parse_pattern(path: str, is_there: Callable[[str], bool] = lambda path: False) -> Pattern:
    """Split a path. Raises ConfigError for one that cannot match.

    `is_there(path)`: whether there is a file or folder of just this name. Leading components with
    wildcards are names, and part of the root, as long as there is.
    """
    cut = _end_of_root(path, is_there)
    if cut == len(path):
        return _pattern(path.rstrip("/") or "/", "", _FILES_BELOW, is_recursive=True)
    if is_s3(path) and cut <= len("s3://"):
        raise ConfigError(f"input.path {path}: the bucket's name cannot have wildcards")
    root = (path[:cut].rstrip("/") or "/") if cut else "."
    components = [part for part in path[cut:].split("/") if part not in ("", ".")]
    if ".." in components:
        raise ConfigError(f"input.path {path}: `..` cannot follow a wildcard")
    is_recursive = len(components) > 1 or components == ["**"]
    regex = "".join(_translate(components, path))
    return _pattern(root, path[cut:], regex, is_recursive=is_recursive)


def matches(paths: Sequence[str], url: str) -> bool:
    """Whether a file at `url` (there or not) would be read as input by `paths`."""
    folder, _, name = url.rpartition("/")
    real_url = url if is_s3(url) else join_url(_real(folder or "/"), name)
    return any(_matches_one(path, real_url) for path in paths)


def _matches_one(path: str, url: str) -> bool:
    if is_s3(path) != is_s3(url):
        return False
    for root, pattern in _rooted(path):
        if url == root:
            return url.endswith(SUFFIX)
        below = root.rstrip("/") + "/"
        if url.startswith(below) and pattern.is_read(url[len(below) :]):
            return True
    return False


@lru_cache(maxsize=256)
def _rooted(path: str) -> list[tuple[str, Pattern]]:
    """All that the path can mean: what is there by a name with wildcards is not known here."""
    readings = []
    for num_names in range(len(path.split("/")) + 1):
        with suppress(ConfigError):  # it was listed, so one of the readings is possible
            readings.append(parse_pattern(path, _first_times(num_names)))
    return [(p.root if is_s3(p.root) else _real(p.root), p) for p in dict.fromkeys(readings)]


def _first_times(count: int) -> Callable[[str], bool]:
    answers = iter([True] * count)
    return lambda path: next(answers, False)


def _real(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


def _end_of_root(path: str, is_there: Callable[[str], bool]) -> int:
    """Where the part with wildcards begins; the length of the path if there is none."""
    start = len("s3://") if is_s3(path) else 0
    while (found := _WILDCARD.search(path, start)) is not None:
        end = path.find("/", found.start())
        end = len(path) if end < 0 else end
        begin = path.rfind("/", 0, found.start()) + 1
        if path[begin:end] == "**" or not is_there(path[:end]):
            return begin
        start = end
    return len(path)


def _pattern(root: str, text: str, regex: str, *, is_recursive: bool) -> Pattern:
    is_read = rf"{regex}(?:(?<={re.escape(SUFFIX)})/{_FILES_BELOW})?"
    first = _WILDCARD.search(text)
    return Pattern(
        root,
        text[: first.start()] if first else "",
        is_recursive,
        text,
        re.compile(regex, re.DOTALL),
        re.compile(is_read, re.DOTALL),
        re.compile(is_read.replace(_NOT_HIDDEN, ""), re.DOTALL),
    )


def _translate(components: Sequence[str], path: str) -> Iterator[str]:
    for index, component in enumerate(components):
        is_last = index == len(components) - 1
        if component == "**":
            yield _ANY_FOLDERS
            if is_last:
                yield rf"{_NOT_HIDDEN}[^/]+"
        else:
            yield _translate_component(component, path)
            if not is_last:
                yield "/"


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
