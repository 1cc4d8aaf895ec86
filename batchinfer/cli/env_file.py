"""A file of environment variables, NAME=VALUE a line, as `.env` files are.

Must not know: what a variable means. Invariants: no line is ignored; no message repeats a value,
which may be a secret.
"""

from __future__ import annotations

import io
from pathlib import Path

from batchinfer.errors import ConfigError


def read_env_file(path: str) -> dict[str, str]:
    """The variables in the file, in its order. `$` in a value means itself.

    Raises ConfigError if it cannot be read, or naming every line that sets nothing.
    """
    from dotenv.parser import parse_stream

    if not path:
        raise ConfigError("--env-file: the name of the file is empty (an unset variable?)")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--env-file {path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--env-file {path}: cannot read the file: {reason}") from None
    variables: dict[str, str] = {}
    lines: dict[str, int] = {}
    problems = []
    for binding in parse_stream(io.StringIO(text)):
        written = binding.original.string
        line = binding.original.line + len(written) - len(written.lstrip("\n"))
        name, value = binding.key, binding.value
        if binding.error or (name is not None and value is None):
            problems.append(f"{path}:{line}: must look like NAME=VALUE")
        elif name is not None and value is not None:
            if not name or "=" in name or "\0" in name + value:
                problems.append(f"{path}:{line}: this name or value cannot be a variable")
            if name in lines:
                problems.append(f"{path}:{line}: {name}: given twice, first in line {lines[name]}")
            lines[name] = line
            variables[name] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return variables
