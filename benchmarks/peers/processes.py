"""What is seen of a contender from outside: its processes, their CPU time, their end.

A family is a process with all that descend from it, those included that outlive their parents: it
is sampled as a whole and killed as a whole. Only processes started here are ever touched.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.common import ROOT

SAMPLE_S = 0.1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Family:
    """A started command. `samples`: (seconds since the epoch, CPU seconds of all by then)."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.samples: list[tuple[float, float]] = []
        self.started_s = time.time()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                # Ray's workers start elsewhere, and unpickle functions of ours by name.
                env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # (pid, start tick) -> CPU seconds; a pid alone may be given out anew.
        self._cpu_s: dict[tuple[int, int], float] = {}
        self.sample()

    def sample(self) -> set[int]:
        """Take a sample. Returns the pids that are alive."""
        table = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                # Gone since, or another user's.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    table[int(entry.name)] = fields
        keys = {pid: (pid, int(fields[19])) for pid, fields in table.items()}
        own = {pid for pid, key in keys.items() if key in self._cpu_s}
        if self._process.poll() is None:
            own.add(self._process.pid)
        # Parents are not always older than their children's pids: until nothing is added.
        while more := {p for p, f in table.items() if p not in own and int(f[1]) in own}:
            own |= more
        for pid in own & table.keys():
            self._cpu_s[keys[pid]] = (int(table[pid][11]) + int(table[pid][12])) / _TICKS_PER_S
        self.samples.append((time.time(), sum(self._cpu_s.values())))
        return {pid for pid in own & table.keys() if table[pid][0] != "Z"}

    def wait(self, is_over: Callable[[], bool], timeout_s: float) -> bool:
        """Sample until `is_over` or the command ended. Returns False when the time is up."""
        while self._process.poll() is None and not is_over():
            if time.time() - self.started_s > timeout_s:
                return False
            self.sample()
            time.sleep(SAMPLE_S)
        self.sample()
        return True

    @property
    def cpu_s(self) -> float:
        """At the last sample."""
        return self.samples[-1][1]

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL to all of them, until none is left."""
        while pids := self.sample():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            self._process.poll()

    def cpu_s_between(self, begin_s: float, end_s: float) -> float:
        return self._cpu_s_at(end_s) - self._cpu_s_at(begin_s)

    def _cpu_s_at(self, at_s: float) -> float:
        """Between two samples as on a straight line."""
        index = bisect.bisect_left(self.samples, (at_s, 0.0))
        if index == 0 or index == len(self.samples):
            return self.samples[min(index, len(self.samples) - 1)][1]
        (t0, cpu0), (t1, cpu1) = self.samples[index - 1 : index + 1]
        return cpu0 + (cpu1 - cpu0) * (at_s - t0) / (t1 - t0)
