"""Who holds a lease: enough to tell, on the same machine, whether that process still lives.

Must not know: how a lease is taken.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from batchinfer.errors import LeaseHeld, LeaseLost


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that runs a job."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_start: str  # clock ticks since boot: tells a reused pid
    since: str  # UTC, for people
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def current(cls, since: str) -> Holder:
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            boot_id=_read("/proc/sys/kernel/random/boot_id"),
            pid_namespace=_pid_namespace(),
            pid=pid,
            process_start=process_start(pid) or "",
            since=since,
        )

    @classmethod
    def from_record(cls, record: Any) -> Holder | None:
        """From what a lease has of it, beside other fields; None if that is damaged."""
        if not isinstance(record, dict):
            return None
        try:
            return cls(**{f.name: record[f.name] for f in fields(cls)})
        except KeyError:
            return None

    def is_dead_here(self) -> bool | None:
        """True or False if this machine can tell, None if the holder runs (or ran) elsewhere."""
        here = (_read("/proc/sys/kernel/random/boot_id"), _pid_namespace())
        if (self.boot_id, self.pid_namespace) != here or not self.boot_id:
            return None
        return process_start(self.pid) != self.process_start

    def describe(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"


def refusal(where: str, holder: Holder | None) -> LeaseHeld:
    who = holder.describe() if holder else "its holder has not said who it is yet"
    return LeaseHeld(
        f"another run is working on {where} ({who}). Wait for it or stop it; this start changed "
        "nothing"
    )


def refusal_of_joined(where: str, holder: Holder | None) -> LeaseHeld:
    who = holder.describe() if holder else "none of them has said who it is yet"
    return LeaseHeld(
        f"joined runs are working on {where} ({who}). Start with --join to work beside them, or "
        "wait until they have ended; this start changed nothing"
    )


def lost(where: str) -> LeaseLost:
    return LeaseLost(
        f"{where} was deleted, moved or replaced while this run worked on it, so nothing more is "
        "written there. Start again: what is missing there is computed"
    )


def process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot, None if there is none."""
    stat = _read(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] == "Z":
        return None
    return fields[19]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
