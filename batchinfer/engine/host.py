"""This machine's memory and processes, as the kernel and our control group have it.

Must not know: what needs it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from batchinfer.limits import memory_bytes_left


def total_memory_bytes() -> int:
    """The machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Memory this process may still take: the machine's, or what its group or limits leave."""
    left = memory_bytes_left()
    available = _available_to_group_bytes()
    return available if left is None else min(available, left)


def _available_to_group_bytes() -> int:
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(available, max(0, limit - used + int(stat["inactive_file"])))
    except (OSError, ValueError):  # no control group of version 2, or its limit is "max"
        return available


def own_memory_bytes() -> int:
    """What this process holds in memory at the moment, shared pages included."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def own_pids() -> frozenset[int]:
    """This process and all that descend from it: an engine's workers are grandchildren."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended
                after_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
                parents[int(entry.name)] = int(after_name.split()[1])
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return frozenset(own)


def process_name(pid: int) -> str | None:
    """As the kernel has it; None if it cannot be seen."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return None


def oom_kills() -> int:
    """How many processes of our control group the kernel has ended for lack of memory so far."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])
    except (OSError, ValueError, KeyError):  # no control group of version 2
        return 0
