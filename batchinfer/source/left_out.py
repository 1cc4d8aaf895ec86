"""What an input path comes upon and does not read: said once, with a few names and how many.

Must not know: storage, how paths are matched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path

logger = logging.getLogger("batchinfer.source")

_MAX_NAMED = 5


class Why(Enum):
    """Why something is left out, or is read although it is not an ordinary shard."""

    OTHER_ENDING = "left out because the name does not end in .parquet"
    HIDDEN = "left out because a name begins with _ or . (a path that spells it out reads it)"
    FOLDER = (
        "left out because it is a folder (a path that ends in /*.parquet or /** reads its files)"
    )
    NOT_LITERAL = (
        "left out because input.path, read literally, names an existing file or folder (write [[], "
        "[*] or [?] for such a character to say so explicitly)"
    )
    TWIN = "read twice because a link leads to a file that is also read"


@dataclass(slots=True)
class Names:
    """A few names and how many there are."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < _MAX_NAMED:
            self.first.append(in_print(name))

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


class LeftOut:
    """Collects over all input paths."""

    def __init__(self) -> None:
        self._names: dict[Why, Names] = {}

    def add(self, why: Why, url: str) -> None:
        self._names.setdefault(why, Names()).add(url)

    def add_twins(self, paths: Iterable[str]) -> None:
        """Add those of the local files that are, through a link, the same as one before."""
        seen: dict[Path, str] = {}
        for path in paths:
            first = seen.setdefault(_real(path), path)
            if first != path:
                self.add(Why.TWIN, f"{path} (the same as {first})")

    def warn(self) -> None:
        for why, names in self._names.items():
            logger.warning("input: %s: %s", why.value, names)

    def __str__(self) -> str:
        return "; ".join(f"{why.value}: {names}" for why, names in self._names.items())


def in_print(name: str) -> str:
    """A name as one line of text, whatever bytes it is made of."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _real(path: str) -> Path:
    file = Path(path)
    return file.resolve() if file.is_symlink() else _real_folder(file.parent) / file.name


@cache
def _real_folder(folder: Path) -> Path:
    return folder.resolve()
