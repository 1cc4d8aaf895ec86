"""stdout and stderr of a command: what cannot be written to stdout ends it, what cannot be written
to stderr is dropped.

As Unix tools do it: where the reader of a pipe went away the process ends silently, as by SIGPIPE;
where the disk is full it says so and ends with an error, so that nobody takes half an output for a
whole one. Must not know: who prints. (`run` has streams of its own, telemetry/stdio.py.)
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from batchinfer.errors import TransientError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

#: What a shell shows of a process that SIGPIPE ended.
READER_GONE_CODE = 141


class ReaderGone(BaseException):
    """Whoever read our stdout went away. No handler of errors means this, so it is none."""


def check_streams() -> None:
    """Take over `sys.stdout` and `sys.stderr`. Descriptors that were closed lead to /dev/null."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file opened would be stdout
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = _text_stream(_Checked(1), sys.stdout)
    sys.stderr = _text_stream(_Dropping(2), sys.stderr)


def _text_stream(raw: io.FileIO, before: TextIO | None) -> TextIO:
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True
    )


class _Dropping(io.FileIO):
    """Writes all or, once that has failed, nothing."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._is_lost = False

    def write(self, content: ReadableBuffer, /) -> int:
        view = memoryview(content).cast("B")
        written = 0
        try:
            while written < len(view) and not self._is_lost:
                done = super().write(view[written:])
                if done is None:  # some parents hand over non-blocking pipes
                    self._wait()
                written += done or 0
        except OSError as error:
            self._is_lost = True  # also for the flush at the end of the process
            self._on_loss(error)
        return len(view)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        poll.poll()

    def _on_loss(self, error: OSError) -> None:
        pass


class _Checked(_Dropping):
    def _on_loss(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from error
        raise TransientError(
            f"cannot write to stdout: {error.strerror}. What was printed is incomplete: run the "
            "command again once there is room, or send its output elsewhere"
        ) from error
