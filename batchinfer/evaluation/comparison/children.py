"""Runs each entry in its own process: its memory is freed, and a crash of it is not ours.

Must not know: specs, caches, how anything is measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from batchinfer.errors import TransientError
from batchinfer.evaluation.record import PerplexityRequest, Record
from batchinfer.storage.local_errors import os_errors

#: The program of a child: REQUEST WORK ANSWER, three paths, and our process id.
CHILD = (sys.executable, "-m", "batchinfer.evaluation.comparison.child")
_BUG = 1
_LAST_LINES = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no record. `exit_code`: 2 yours to fix, 75 worth another start, 1 a bug."""

    message: str
    exit_code: int


def measure_in_child(
    request: PerplexityRequest,
    work: Path,
    log: Path,
    program: Sequence[str] = CHILD,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Record | Failure:
    """Raises TransientError, ConfigError only for what this process cannot write.

    Everything that the child and its libraries print goes to `log`; `on_warning` gets what our own
    loggers warned of in it.
    """
    asked, answer = work.parent / "request.json", work.parent / "answer.json"
    with os_errors("write", work.parent):
        work.mkdir(parents=True, exist_ok=True)
        answer.unlink(missing_ok=True)
        asked.write_text(request.model_dump_json(indent=1), encoding="utf-8")
        with log.open("wb") as sink:
            code = _run([*program, str(asked), str(work), str(answer), str(os.getpid())], sink)
    return _read(answer, code, log, on_warning)


def _run(command: list[str], sink: Any) -> int:
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise TransientError(f"cannot start a process: {error.strerror}") from error
    try:
        return child.wait()
    finally:  # we are being stopped: so is the child, which keeps what it has finished
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
            child.kill()
            child.wait()


def _read(
    answer: Path, code: int, log: Path, on_warning: Callable[[str], None]
) -> Record | Failure:
    try:
        content = json.loads(answer.read_bytes())
        for text in content.get("warnings", []):
            on_warning(text)
        if "record" in content:
            return Record.model_validate(content["record"])
        return Failure(str(content["error"]), int(content["exit_code"]))
    except FileNotFoundError:
        return _died(code, log)
    except (ValueError, KeyError, ValidationError) as error:
        return Failure(f"its process wrote a damaged answer: {error}", _BUG)


def _died(code: int, log: Path) -> Failure:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return Failure(
            f"its process was ended by {name}{hint}; see {log}", TransientError.exit_code
        )
    return Failure(f"its process ended with exit code {code}: {_last_words(log)}; see {log}", _BUG)


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " / ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:]) or "silent"
