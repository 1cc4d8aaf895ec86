"""The limits that this process was started with (`ulimit`, cgroups): what they leave, in words.

A limit is met in places that nobody foresaw, and libraries abort or loop there: OpenBLAS asks for
memory again forever, C++ ends the process with SIGABRT, OpenMP with exit code 1. So what certainly
will not do is refused before they are imported, and what fails later names the limit. Must not
know: what needs the memory. Linux; only the standard library.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MIB = 1 << 20
_GIB = 1 << 30
#: An event loop, a log, the input, an output's parts: of every command.
LEAST_FILES = 32
#: Arrow, numpy and polars are 0.7 GiB of address space once they are imported on two cores.
LEAST_ADDRESS_BYTES = _GIB
#: Of numpy's, Arrow's and polars' pools, and of a run's own.
LEAST_THREADS = 24
_MEMORY_LIMITS = ((resource.RLIMIT_AS, "-v", "VmSize"), (resource.RLIMIT_DATA, "-d", "VmData"))
#: Of the address space, this part is data: the rest is code and mapped files.
_DATA_SHARE = 3
#: A thread's stack and the heap that glibc reserves for it.
_THREAD_BYTES = 136 * _MIB
#: Files that are open at the moment of an error are closed when it is asked about.
_FILES_NEARBY = 16


def raise_open_files() -> None:
    """Take as many open files as this process may: the usual 1024 is for programs of `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Shortage(NamedTuple):
    """`text`: what is needed and which limit is below it. `may_pass`: others take what there is."""

    text: str
    may_pass: bool = False


def shortage(
    *,
    num_files: int = LEAST_FILES,
    num_bytes: int = LEAST_ADDRESS_BYTES,
    num_threads: int = LEAST_THREADS,
) -> Shortage | None:
    """What is needed from now on and the limits do not leave; None if they leave it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _num_open() + num_files
    if soft != resource.RLIM_INFINITY and soft < needed:
        return Shortage(f"about {needed} open files, and {_file_limit(soft)}")
    for number, option, field in _MEMORY_LIMITS:
        soft, _ = resource.getrlimit(number)
        needed = _status_bytes(field) + num_bytes // (1 if field == "VmSize" else _DATA_SHARE)
        if soft != resource.RLIM_INFINITY and soft < needed:
            size = f"{needed / _GIB:.1f} GiB of address space"
            return Shortage(f"about {size}, and {_memory_limit(soft, option)}")
    for limit, used, name in _thread_limits():
        if limit < used + num_threads:
            text = f"about {num_threads} more threads, and {name}, {used} of them in use"
            return Shortage(f"{text}: raise it, or end others", limit >= 2 * num_threads)
    return None


def memory_limit() -> str | None:
    """The limit of memory that this process has, and what lifts it. None if there is none."""
    for number, option, _ in _MEMORY_LIMITS:
        soft, _hard = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            return _memory_limit(soft, option)
    return None


def memory_bytes_left() -> int | None:
    """What the limits of memory still leave to this process. None: there are none."""
    left = []
    for number, _, field in _MEMORY_LIMITS:
        soft, _hard = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            left.append(max(0, soft - _status_bytes(field)))
    return min(left, default=None)


def file_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _file_limit(soft)


def thread_limit() -> str:
    """What keeps a thread from being started: a limit of memory if that is short, or of threads."""
    for number, option, field in _MEMORY_LIMITS:
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and soft < _status_bytes(field) + _THREAD_BYTES:
            return _memory_limit(soft, option)
    names = [name for _, _, name in _thread_limits()]
    return " and ".join(names) or "raise `ulimit -u` or the container's limit of processes"


def size_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return "use a file system that takes larger files"
    return (
        f"the limit of a file's size (`ulimit -f`) is {_size(soft)}: lift it where it is set "
        "(`ulimit -f unlimited` in the shell, LimitFSIZE=infinity of systemd)"
    )


def is_short_of_files() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and soft < _num_open() + _FILES_NEARBY


def is_short_of_memory() -> bool:
    """Whether the most that this process had is near the limit that it has."""
    for number, _, field in _MEMORY_LIMITS:
        soft, _hard = resource.getrlimit(number)
        had = _status_bytes("VmPeak" if field == "VmSize" else field)
        if soft != resource.RLIM_INFINITY and soft < 2 * had:
            return True
    return False


def limit_met() -> str | None:
    """The limit that is likely behind an error that says nothing of limits; None if there is none.

    Without a descriptor, for example, gloo cannot resolve 127.0.0.1.
    """
    if is_short_of_files():
        return sentence(file_limit())
    if is_short_of_memory() and (limit := memory_limit()):
        return sentence(limit)
    return None


def sentence(text: str) -> str:
    """Begun with a capital letter."""
    return text[0].upper() + text[1:]


def _file_limit(soft: int) -> str:
    return (
        f"the limit of open files (`ulimit -n`) is {soft}: raise it where it is set (`ulimit -n "
        "4096` in the shell, LimitNOFILE= of systemd)"
    )


def _memory_limit(soft: int, option: str) -> str:
    key = "LimitAS" if option == "-v" else "LimitDATA"
    return (
        f"the limit of the process's memory (`ulimit {option}`) is {_size(soft)}: lift it where it "
        f"is set (`ulimit {option} unlimited` in the shell, {key}=infinity of systemd)"
    )


def _size(num_bytes: int) -> str:
    for name, size in (("GiB", _GIB), ("MiB", _MIB)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {name}"
    return f"{num_bytes:,} bytes"


def _thread_limits() -> Iterator[tuple[int, int, str]]:
    """(limit, taken now, name) of each limit of threads that binds this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # root is not bound by it
        name = f"the limit of this user's processes and threads (`ulimit -u`) is {soft}"
        yield soft, _num_threads_of_user(), name
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no control group of version 2, or its limit is "max"
        limit = int((group / "pids.max").read_text())
        used = int((group / "pids.current").read_text())
        yield limit, used, f"the container's limit of processes and threads (pids.max) is {limit}"


def _num_threads_of_user() -> int:
    """As the kernel counts them for RLIMIT_NPROC: by the real user."""
    user = os.getuid()
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError):  # it has ended
                if entry.stat().st_uid == user:
                    total += sum(1 for _ in (entry / "task").iterdir())
    return total


def _num_open() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:  # none is left to look with
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _status_bytes(field: str) -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
    return 0
