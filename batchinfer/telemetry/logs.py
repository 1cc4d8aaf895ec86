"""Logging for one process: our events on stderr, for people or machines; everything in a log file.

Events are names with fields (`log_event`); plain messages of any logger work too. Loggers of
libraries reach the log file alone. What our own loggers warn of is also collected, so that machines
are told. Must not know: who logs, or what. Prompts and completions are logged at the level DEBUG
alone, which is off unless somebody asks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Self, TextIO

from batchinfer.errors import printable
from batchinfer.telemetry.clock import utc_text

LOGGER_NAME: Final = "batchinfer"
MAX_WARNINGS: Final = 20
MAX_WARNING_CHARS: Final = 500


def log_event(logger: logging.Logger, level: int, event: str, /, **fields: object) -> None:
    """Log `event` with its fields: `event key=value …` for people, one JSON object for machines."""
    logger.log(level, event, extra={"fields": fields}, stacklevel=2)


class Warnings(logging.Handler):
    """What loggers of ours warn of: each text once, the first of them whole, the rest counted.

    Invariant: bounded, however many warnings come.
    """

    def __init__(self, report: Callable[[str], None] = lambda text: None) -> None:
        """`report` is called with each text that is kept."""
        super().__init__(logging.WARNING)
        self._report = report
        self._kept: dict[str, logging.LogRecord] = {}
        self._num_more = 0

    @property
    def records(self) -> list[logging.LogRecord]:
        """The records of the texts that are kept."""
        return list(self._kept.values())

    def texts(self) -> list[str]:
        """One line each; the last one counts those that are left out."""
        with self.lock or nullcontext():
            more = [f"and {self._num_more:,} more warnings"] if self._num_more else []
            return [*self._kept, *more]

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno != logging.WARNING:
            return
        text = _one_line(record)
        if len(text) > MAX_WARNING_CHARS:
            text = text[: MAX_WARNING_CHARS - 1] + "…"
        if text in self._kept:
            return
        if len(self._kept) == MAX_WARNINGS:
            self._num_more += 1
            return
        self._kept[text] = record
        self._report(text)

    def __enter__(self) -> Self:
        logging.getLogger(LOGGER_NAME).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(LOGGER_NAME).removeHandler(self)


class Logs:
    """The handlers of this process; call `open_file` when the run's log file is known."""

    def __init__(self, err: TextIO, *, json_lines: bool = False, level: int = logging.INFO) -> None:
        """`level` is the terminal's (logging.ERROR: quiet); the file always gets INFO and above.

        With DEBUG the terminal shows what the file gets: as JSON lines what all loggers say; as
        text nothing more is written to it once there is a file, whose reader it then is (see
        `Stdio`).
        """
        self.warnings = Warnings()
        self._context = _RunContext()
        self.terminal = logging.StreamHandler(err)
        self.terminal.setLevel(level)
        self.terminal.setFormatter(JsonFormatter() if json_lines else HumanFormatter())
        self.terminal.addFilter(self._context)
        self._file: logging.FileHandler | None = None
        self._json_lines = json_lines
        # Without any handler the root logger would print warnings of libraries to stderr itself.
        self._silence = logging.NullHandler()
        self._root = logging.getLogger()
        self._ours = logging.getLogger(LOGGER_NAME)
        self._before = (self._root.level, self._ours.level, self._ours.propagate)
        self._root.addHandler(self._silence)
        self._ours.addHandler(self.terminal)
        self._ours.addHandler(self.warnings)
        self._ours.setLevel(min(level, logging.INFO))
        self._ours.propagate = False

    def open_file(self, path: Path, run: int) -> None:
        """Let every logger of the process append to `path`; records carry `run` from now on."""
        self._context.run = run
        self._file = logging.FileHandler(
            path, mode="a", encoding="utf-8", errors="backslashreplace"
        )
        self._file.setLevel(min(self.terminal.level, logging.INFO))
        self._file.setFormatter(HumanFormatter(is_file=True))
        self._root.addHandler(self._file)
        self._root.setLevel(logging.INFO)
        self._ours.addHandler(self._file)
        for record in self.warnings.records:  # of the time before the file was there
            self._file.handle(record)
        if self.terminal.level <= logging.DEBUG:
            if self._json_lines:
                self._root.addHandler(self.terminal)
            else:
                self._ours.removeHandler(self.terminal)

    def flush(self) -> None:
        for handler in (self.terminal, self._file):
            if handler is not None:
                handler.flush()

    def close(self) -> None:
        """Take the handlers off again and close the log file. Idempotent."""
        self.flush()
        self._ours.removeHandler(self.terminal)
        self._root.removeHandler(self.terminal)
        self._ours.removeHandler(self.warnings)
        self._root.removeHandler(self._silence)
        if self._file is not None:
            self._root.removeHandler(self._file)
            self._ours.removeHandler(self._file)
            self._file.close()
            self._file = None
        self._root.setLevel(self._before[0])
        self._ours.setLevel(self._before[1])
        self._ours.propagate = self._before[2]


@contextmanager
def debug_loggers(handler: logging.Handler) -> Iterator[None]:
    """What every logger says from INFO on reaches `handler`, and what ours say from DEBUG on."""
    root, ours = logging.getLogger(), logging.getLogger(LOGGER_NAME)
    before = (root.level, ours.level)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    ours.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])


class _RunContext(logging.Filter):
    run: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        record.run = self.run
        return True


class HumanFormatter(logging.Formatter):
    """`2026-11-21 12:30:01Z warning shard_finished rows=512`; tracebacks on lines of their own.

    In a file every record begins with its logger and is one line; on a terminal the further lines
    of a message are indented, and fields that are mappings are left to the file and to JSON.
    """

    def __init__(self, *, is_file: bool = False) -> None:
        name = "%(name)s " if is_file else ""
        super().__init__(f"%(asctime)s {name}%(message)s", "%Y-%m-%d %H:%M:%SZ")
        self.converter = time.gmtime
        self._is_file = is_file

    def formatMessage(self, record: logging.LogRecord) -> str:
        words = [printable(record.message).replace("\n", " " if self._is_file else "\n  ")]
        if record.levelno != logging.INFO:
            words.insert(0, record.levelname.lower())
        words += _human_fields(record, has_mappings=self._is_file)
        record.message = " ".join(words)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, run, then the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": utc_text(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "run": getattr(record, "run", None),
        }
        line |= {key: value for key, value in _record_fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _record_fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _one_line(record: logging.LogRecord) -> str:
    words = [
        printable(record.getMessage()).replace("\n", " "),
        *_human_fields(record, has_mappings=False),
    ]
    return " ".join(words)


def _human_fields(record: logging.LogRecord, *, has_mappings: bool) -> list[str]:
    return [
        f"{key}={_human_value(value)}"
        for key, value in _record_fields(record).items()
        if has_mappings or not isinstance(value, Mapping)
    ]


def _human_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    text = json.dumps(value, default=str) if isinstance(value, Mapping) else printable(str(value))
    if text and not any(c.isspace() or c in '="' for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)
