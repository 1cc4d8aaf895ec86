"""Fails the n-th call to the operating system below a folder, whatever call that is."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any
from unittest import mock

from batchinfer.storage.local_errors import CheckedFile

_BY_PATH = ("open", "link", "stat", "scandir", "unlink", "replace", "mkdir", "rmdir")
_BY_DESCRIPTOR = ("fsync", "ftruncate", "pwrite", "fstat")


class OsFaults:
    """Counts calls below `root`; the one with number `at` (from 1) fails with `number`.

    `times`: so many from there on. Which call it was is in `failed`.
    """

    def __init__(self, root: Path, *, at: int = 0, number: int = 0, times: int = 1) -> None:
        self._root = str(root)
        self._failing = range(at, at + times) if at else range(0)
        self._number = number
        self._lock = threading.Lock()
        self.num_calls = 0
        self.failed: list[str] = []

    def reached(self, name: str, path: str) -> None:
        if not path.startswith(self._root):
            return
        with self._lock:
            self.num_calls += 1
            if self.num_calls not in self._failing:
                return
            self.failed.append(f"{name} {path.removeprefix(self._root)}")
        raise OSError(self._number, os.strerror(self._number), path)

    @contextmanager
    def installed(self) -> Iterator[OsFaults]:
        with ExitStack() as patches:
            for name in (*_BY_PATH, *_BY_DESCRIPTOR):
                faulty = self._faulty(name, getattr(os, name))
                patches.enter_context(mock.patch.object(os, name, faulty))
            flock = self._faulty("flock", fcntl.flock)
            patches.enter_context(mock.patch.object(fcntl, "flock", flock))
            bases = CheckedFile.__bases__
            patches.callback(setattr, CheckedFile, "__bases__", bases)
            CheckedFile.__bases__ = (self._file(),)
            yield self

    def _faulty(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(first, int):
                path = str(Path(f"/proc/self/fd/{first}").readlink())
            else:
                # Of link and replace the destination; a folder's own name stands for the folder.
                path = os.fspath(arguments[0] if name in ("link", "replace") else first)
            self.reached(name, path)
            return real(first, *arguments, **options)

        return call

    def _file(self) -> type[FileIO]:
        faults = self

        class FaultyFile(FileIO):
            def __init__(self, file: Any, mode: str = "r") -> None:
                faults.reached("open", os.fspath(file))
                super().__init__(file, mode)

            def readinto(self, buffer: Any, /) -> int:
                faults.reached("read", os.fspath(self.name))
                return super().readinto(buffer)

            def readall(self) -> bytes:
                faults.reached("read", os.fspath(self.name))
                return super().readall()

            def write(self, content: Any, /) -> int:
                faults.reached("write", os.fspath(self.name))
                return super().write(content)

            def close(self) -> None:
                is_open = not self.closed
                super().close()
                if is_open:
                    faults.reached("close", os.fspath(self.name))

        return FaultyFile
