"""What a case broke, under a name that is the same for the same fault."""

from __future__ import annotations

import re

from tests.fuzz.server import Ended

_FRAME = re.compile(r'File "[^"]*?([\w.]+/[\w.]+\.py)", line \d+, in (\w+)')
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\d+|/\S+")


class Broken(AssertionError):
    """A promise that does not hold."""

    def __init__(self, promise: str, ended: Ended, detail: str = "") -> None:
        self.promise = promise
        text = detail or ended.stderr or ended.stdout
        self.kind = f"{promise}: {_fault(text)}" if text else promise
        lines = [
            f"{promise}: {' '.join(ended.argv)} ended with {ended.code} after {ended.seconds} s"
        ]
        super().__init__("\n".join([*lines, ended.stdout[-2000:], text[-6000:]]))


def _fault(text: str) -> str:
    """The deepest frame of ours and the exception, or the last line without its names."""
    ours = [match for match in _FRAME.findall(text) if "site-packages" not in match[0]]
    lines = [line for line in text.splitlines() if line.strip()]
    last = _QUOTED.sub("…", lines[-1])[:100] if lines else ""
    where = ", ".join(f"{name}:{function}" for name, function in ours[-1:])
    return f"{where} {last}".strip()
