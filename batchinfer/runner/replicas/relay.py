"""What a cluster's actor is: the process of a replica on the actor's node, reached through it.

The process is that of a replica on one machine, so the actor stays light, and what computes is
started in the same way everywhere. Must not know: which cluster, what is said. Invariant: the
process ends with the actor, and both end if nobody listens any more, so a node that is cut off
writes no longer by the time that its work is another's.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

from batchinfer import __version__
from batchinfer.engine.base import Placement
from batchinfer.imports import is_secret
from batchinfer.ledger.holder import Holder
from batchinfer.runner.replicas.messages import FromReplica, ReplicaOrder, ToReplica
from batchinfer.runner.replicas.process import ReplicaProcess

#: Of what a listener does not ask for in the time, it is told that there is nothing.
_LISTEN_S = 1.0
#: Without a listener. Less than after what time a silent replica is given up (`fleet`).
ORPHANED_S = 30.0

#: Of this process's environment, what a replica gets: how engines compute and nothing secret, as
#: each node has its own credentials.
CARRIED = ["OMP_NUM_THREADS", "VLLM_", "HF_HUB_OFFLINE"]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an actor is."""

    host: str
    machine: str  # the same for actors that share cores
    cores: Sequence[int]  # that it may use
    version: str  # of this program there


@dataclass(frozen=True, slots=True)
class Launch:
    """How the process of a replica is started there."""

    module: str
    environ: Mapping[str, str]
    folder: str  # that relative paths begin in, if it is there
    orphaned_s: float = ORPHANED_S


def carried() -> Mapping[str, str]:
    """What of this process's environment a replica elsewhere gets."""
    names = [name for name in os.environ if name.startswith(tuple(CARRIED))]
    return {name: os.environ[name] for name in names if not is_secret(name)}


class Relay:
    """Its methods are called from elsewhere; `listen` beside one of the others."""

    def __init__(self) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # the cluster's guess: an engine has its own
        self._heard_s = time.monotonic()
        self._launches: queue.SimpleQueue[tuple[ReplicaOrder, Launch]] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[ReplicaProcess | BaseException] = queue.SimpleQueue()
        self._process: ReplicaProcess | None = None
        threading.Thread(target=self._keep, name="keep", daemon=True).start()

    def spot(self) -> Spot:
        here = Holder.current(since="")
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return Spot(here.host, f"{here.boot_id} {here.pid_namespace}", cores, __version__)

    def start(self, order: ReplicaOrder, launch: Launch) -> int:
        """Start the process. -> its id."""
        self._heard_s = time.monotonic()
        self._launches.put((replace(order, parent_pid=os.getpid()), launch))
        launched = self._launched.get()
        if isinstance(launched, BaseException):
            raise launched
        self._process = launched
        return launched.pid

    def send(self, message: ToReplica) -> None:
        if self._process is not None:
            self._process.send(message)

    def listen(self) -> tuple[list[FromReplica], str | None]:
        """What the process has said since, once there is something or a moment is over; and how it
        ended, if it did.
        """
        process = self._process
        assert process is not None
        self._heard_s = time.monotonic()
        deadline_s = self._heard_s + _LISTEN_S
        messages: list[FromReplica] = []
        while not messages and time.monotonic() < deadline_s:
            is_gone = process.is_gone  # before the last look
            wait([process.fileno()], 0.02 if is_gone else _LISTEN_S)
            messages = list(process.messages())
            if is_gone and not messages:
                return [], process.how_ended()
            if not messages and not is_gone:
                time.sleep(0.01)  # its end of the line is closed, and it ends
        self._heard_s = time.monotonic()
        return messages, None

    def _keep(self) -> None:
        """The thread that starts the process, which ends with it, and looks after the listener."""
        order, launch = self._launches.get()
        try:
            with suppress(OSError):
                os.chdir(launch.folder)
            placement = Placement("", launch.environ, cores=tuple(order.cores))
            process = ReplicaProcess(placement, order, launch.module)
        except BaseException as error:
            self._launched.put(error)
            return
        self._launched.put(process)
        while time.monotonic() - self._heard_s < launch.orphaned_s:
            time.sleep(min(1.0, launch.orphaned_s / 4))
        process.kill()
        os._exit(1)
