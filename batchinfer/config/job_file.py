"""The bytes of a job file, or of another file of settings, as a document.

Must not know: jobs. Invariant: nothing is waited for without end, unless somebody writes it.
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

from batchinfer.config.yaml12 import Document, load_yaml
from batchinfer.errors import ConfigError

MAX_JOB_BYTES = 4 << 20
#: How long a pipe may be without a writer: a shell starts both ends at the same time.
_WRITER_WAIT_S = 2.0
_POLL_S = 0.02
_LEADING_TABS = re.compile(r"^[ \t]*\t[ \t]*", re.MULTILINE)


def relative_to() -> str:
    """Where relative paths start, for messages."""
    return f"relative paths start at the current directory, {Path.cwd()}"


def read_document(name: str, what: str = "job file") -> Document:
    """The mapping in the file `name`. Raises ConfigError, in which `what` is what it should be."""
    if not name:
        raise ConfigError(f"the name of the {what} is empty: give its path (an unset variable?)")
    try:
        content = _read(name, what)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        where = "" if Path(name).is_absolute() else f" ({relative_to()})"
        raise ConfigError(f"{name}: no such {what}{where}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}: cannot read the {what}: {reason}") from None
    if name.endswith(".json"):  # where a line cannot begin inside of a text
        text = _LEADING_TABS.sub(lambda tabs: "  " * len(tabs[0]), text)
    document = load_yaml(text, name)
    if document.data is None and not document.problems:
        raise ConfigError(f"{name}: the {what} is empty")
    if not isinstance(document.data, dict):
        problem = f"{name}: must be a mapping (keys with values) at the top"
        raise ConfigError("\n".join([*document.problems, problem]))
    return document


def _read(name: str, what: str) -> bytes:
    mode = Path(name).stat().st_mode
    if stat.S_ISDIR(mode) or stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ConfigError(f"{name}: is a {kind}, not a {what}")
    if stat.S_ISFIFO(mode):
        content = _read_pipe(name, what)
    else:
        with Path(name).open("rb") as file:
            content = file.read(MAX_JOB_BYTES + 1)
    if len(content) > MAX_JOB_BYTES:
        raise ConfigError(f"{name}: is larger than {MAX_JOB_BYTES:,} bytes, the limit for a {what}")
    return content


def _read_pipe(name: str, what: str) -> bytes:
    """As a shell makes it of `<(...)`, or one of that name. What its writer writes is waited for;
    a writer is not: opening a pipe that nobody opens at its other end never returns.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        deadline_s = time.monotonic() + _WRITER_WAIT_S
        while (begin := file.read(MAX_JOB_BYTES + 1)) == b"":  # None: a writer, and nothing yet
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"{name}: is a pipe that nobody writes to: start what writes the {what} "
                    "first, or give a file"
                )
            time.sleep(_POLL_S)
        os.set_blocking(descriptor, True)
        content = begin or b""
        while len(content) <= MAX_JOB_BYTES and (more := file.read(MAX_JOB_BYTES)):
            content += more
    return content
