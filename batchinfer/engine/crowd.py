"""Who holds a GPU's memory beside this job: of what the driver shows, and of what it does not.

Must not know: engines, what a job needs. No function here asks the driver.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from batchinfer.engine.hardware import GIB, Gpu, GpuProcess, Memory, gib
from batchinfer.engine.host import process_name

#: Of a device: what drivers and displays take. Nobody is blamed for less.
_UNBLAMED_BYTES = GIB // 2
#: Of the memory that is taken and that no process is shown for: the driver's own, our context.
_UNSEEN_SLACK_BYTES = GIB + GIB // 2
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class Crowd:
    """What others hold of one device."""

    gpu: Gpu
    others: tuple[GpuProcess, ...]  # largest first
    unseen_bytes: int  # of processes that are not shown here

    @property
    def held_bytes(self) -> int:
        return sum(other.used_bytes or 0 for other in self.others) + self.unseen_bytes

    @property
    def is_noticeable(self) -> bool:
        return self.held_bytes > _UNBLAMED_BYTES

    @property
    def left(self) -> Memory:
        """What a job of ours, and nobody new, could have of the device."""
        return Memory(self.gpu.total_bytes, self.gpu.total_bytes - self.held_bytes)

    def __str__(self) -> str:
        """Who holds what, of which device."""
        holders = [_named(other) for other in self.others[:_MOST_NAMED]]
        if (num_more := len(self.others) - _MOST_NAMED) > 0:
            holders.append(f"{num_more} more processes")
        if self.unseen_bytes:
            holders.append(
                f"processes that are not shown here (of another container or user) hold "
                f"{gib(self.unseen_bytes)}"
            )
        who = ", ".join(holders) or "nobody else holds memory"
        return f"{self.gpu.label} ({self.gpu.name}, {gib(self.gpu.total_bytes)}): {who}"


def crowd_of(gpu: Gpu, own: Collection[int], own_bytes: int = 0) -> Crowd:
    """`own`: the pids of our processes. `own_bytes`: what they hold, if the driver does not say."""
    others = [process for process in gpu.processes if process.pid not in own]
    shown_bytes = sum(process.used_bytes or 0 for process in gpu.processes)
    if not any(process.pid in own for process in gpu.processes):
        shown_bytes += own_bytes
    unseen_bytes = gpu.total_bytes - gpu.free_bytes - shown_bytes
    has_unsized = any(process.used_bytes is None for process in others)
    return Crowd(
        gpu,
        others=tuple(sorted(others, key=lambda process: -(process.used_bytes or 0))),
        unseen_bytes=unseen_bytes if unseen_bytes > _UNSEEN_SLACK_BYTES or has_unsized else 0,
    )


def _named(process: GpuProcess) -> str:
    name = process_name(process.pid)
    who = f"process {process.pid}" + (f" ({name})" if name else "")
    if process.used_bytes is None:
        return f"{who} holds memory, how much is not shown"
    return f"{who} holds {gib(process.used_bytes)} ({process.used_bytes} bytes)"
