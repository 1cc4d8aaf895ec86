"""The process's real stdout and stderr, kept for ourselves while all else writes to a log file.

Engines and their libraries print from Python, C++ and child processes. File descriptors 1 and 2
therefore lead to the log; only `err`, `out` and `write_result` reach whoever started us. Invariant:
no write here raises, as a reader that went away (a scheduler's runner that was killed) must not
stop a flush.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDOUT, _STDERR = 1, 2
_FULL_PIPE_WAIT_MS = 5000
_FOLLOW_S = 0.1
_FOLLOW_END_S = 5.0


class Stdio:
    """Keeps the real streams from the start; `redirect` takes descriptors 1 and 2 away."""

    def __init__(self, *, follows: bool = False) -> None:
        """`follows`: what comes into the log is shown on the real stderr, too."""
        self._follows = follows
        self._follower: _Follower | None = None
        _open_missing_descriptors()
        self._stdout_fd = os.dup(_STDOUT)
        self._stderr_fd = os.dup(_STDERR)
        self.err: TextIO = _text_stream(self._stderr_fd)
        self.out: TextIO = _text_stream(self._stdout_fd)

    def redirect(self, log_path: Path) -> None:
        """Let descriptors 1 and 2 append to `log_path`; may be called again with another file."""
        _flush_python_streams()
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.dup2(log_fd, _STDOUT)
            os.dup2(log_fd, _STDERR)
        finally:
            os.close(log_fd)
        if self._follows:
            self.catch_up()
            self._follower = _Follower(log_path, self._stderr_fd)

    def catch_up(self) -> None:
        """Show what is left of a log that is followed; what comes after that is not shown."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Meanwhile descriptors 1 and 2 lead where they led before: somebody reads a terminal."""
        _flush_python_streams()
        logs = os.dup(_STDOUT), os.dup(_STDERR)
        os.dup2(self._stdout_fd, _STDOUT)
        os.dup2(self._stderr_fd, _STDERR)
        try:
            yield
        finally:
            _flush_python_streams()
            for fd, standard in zip(logs, (_STDOUT, _STDERR), strict=True):
                os.dup2(fd, standard)
                os.close(fd)

    def write_result(self, line: str) -> OSError | None:
        """Write one line to the real stdout; the error if it could not be taken."""
        return _write_all(self._stdout_fd, (line + "\n").encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Lead descriptors 1 and 2 where they led before. Idempotent."""
        if self.err.closed:
            return
        _flush_python_streams()
        self.catch_up()
        self.err.flush()
        self.out.flush()
        os.dup2(self._stdout_fd, _STDOUT)
        os.dup2(self._stderr_fd, _STDERR)
        self.err.close()
        self.out.close()
        os.close(self._stdout_fd)
        os.close(self._stderr_fd)


class _Follower:
    """Copies what is appended to a file from now on to a descriptor, in a thread of its own.

    The file stays the first to have it, so a process that is killed leaves the log of any other.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self._file = path.open("rb")
        self._file.seek(0, os.SEEK_END)
        self._fd = fd
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._copy, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left; whoever reads nothing is waited for a moment."""
        self._is_over.set()
        self._thread.join(_FOLLOW_END_S)

    def _copy(self) -> None:
        with self._file:
            while True:
                is_last = self._is_over.is_set()
                while content := self._file.read(io.DEFAULT_BUFFER_SIZE):
                    _write_all(self._fd, content)
                if is_last:
                    return
                self._is_over.wait(_FOLLOW_S)


class _PatientRaw(io.RawIOBase):
    """Raw bytes to a descriptor it does not own; what cannot be written is dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, content: ReadableBuffer, /) -> int:
        view = memoryview(content).cast("B")
        _write_all(self._fd, view)
        return len(view)


def _text_stream(fd: int) -> TextIO:
    buffered = io.BufferedWriter(_PatientRaw(fd))
    return io.TextIOWrapper(
        buffered, encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def _write_all(fd: int, content: bytes | memoryview) -> OSError | None:
    view = memoryview(content)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError as error:  # some parents hand over non-blocking pipes
            if not poll.poll(_FULL_PIPE_WAIT_MS):
                return error
        except OSError as error:  # broken pipe, terminal gone, disk full
            return error
    return None


def _open_missing_descriptors() -> None:
    """Open what of 0 to 2 was closed at start, or the next file opened would become stdout."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python leaves these None then; a library that prints or flushes would fail on it.
    if sys.stdout is None:
        sys.stdout = _text_stream(_STDOUT)
    if sys.stderr is None:
        sys.stderr = _text_stream(_STDERR)


def _flush_python_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # broken pipe, or closed by somebody
            continue
