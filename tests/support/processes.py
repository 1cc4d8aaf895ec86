"""Processes below one that a test has started, as the kernel lists them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """The living ones, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[1]) == pid:
                    found.append((int(fields[19]), int(entry.name)))
    return [child for _, child in sorted(found)]


def descendants_of(pid: int) -> list[int]:
    """All that live below it."""
    found = children_of(pid)
    return found + [below for child in found for below in descendants_of(child)]


def await_children(pid: int, num_children: int, timeout_s: float = 60) -> list[int]:
    """Once there are so many."""
    deadline_s = time.monotonic() + timeout_s
    while len(children := children_of(pid)) < num_children:
        assert time.monotonic() < deadline_s, f"{pid} has {len(children)} children"
        time.sleep(0.05)
    return children


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def is_stopped(pid: int) -> bool:
    """Whether each of its threads is."""
    states = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return bool(states) and set(states) == {"T"}


def await_end(*pids: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline_s, f"{alive} still live {timeout_s} s later"
        time.sleep(0.05)


def kill_one(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)
