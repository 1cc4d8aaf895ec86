"""Replicas in a Ray cluster: one that RAY_ADDRESS names, or an instance of our own on this machine.

    python -m batchinfer.runner.replicas.on_ray DESCRIPTOR

is that instance: it says its address, and ends with whoever started it. Each replica has an actor
(`relay`), which Ray places and never starts again. The only module that imports Ray. Must not know:
what is said. Invariant: no thread but ours waits for Ray, so the main one obeys a stop at any time.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from batchinfer import __version__
from batchinfer.engine.base import Placement
from batchinfer.errors import ConfigError, TransientError
from batchinfer.imports import import_failure
from batchinfer.runner.replicas.demand import Demand, Node, demand_of
from batchinfer.runner.replicas.instance import OwnInstance, why_unreachable
from batchinfer.runner.replicas.messages import FromReplica, ReplicaOrder, ToReplica
from batchinfer.runner.replicas.process import ReplicaProcess
from batchinfer.runner.replicas.relay import Launch, Relay, Spot, carried
from batchinfer.signals import ignore_stops, kept_handlers

#: For a cluster, how long no replica may have a place: nodes may be on their way.
WAIT_S = 300.0
_ADDRESS = "RAY_ADDRESS"
_LOOK_S = 2.0
_POLL_S, _END_S = 0.5, 2.0
#: Rows never travel through it; this is close to the least that Ray takes.
_OBJECT_STORE_BYTES = 80 << 20


def open_ray(devices: int | str, num_gpus: int, most: int) -> RayPlaces:
    """`num_gpus`: that a replica takes; `most`: replicas.

    Raises ConfigError, TransientError.
    """
    address = os.environ.get(_ADDRESS, "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"{_ADDRESS} is {address}, the address of Ray's client, which runs programs elsewhere: "
            f"start the command on a node of the cluster, with {_ADDRESS}=auto"
        )
    instance = OwnInstance(__spec__.name) if address in ("", "local") else None
    try:
        _connect(address if instance is None else instance.address)
        return RayPlaces(instance, devices, num_gpus, most)
    except BaseException:
        _end(instance)
        raise


class RayPlaces:
    """See `Places`."""

    def __init__(
        self, instance: OwnInstance | None, devices: int | str, num_gpus: int, most: int
    ) -> None:
        self._instance = instance
        self._most = most
        self._nodes = nodes = _nodes()
        self._demand = demand = demand_of(devices, num_gpus, nodes)
        if instance is not None and demand.wanted(nodes) > demand.fitting(nodes):
            raise ConfigError(
                f"engine.devices is {devices}, too much for Ray on this machine: "
                f"{demand.lack(nodes)}. Lower it, or name a cluster with {_ADDRESS}"
            )
        self._num_appeared = 0
        self._actor = _actor_class(self._demand)
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._replicas: list[RayReplica] = []
        threading.Thread(target=self._look, name="cluster", daemon=True).start()

    def appeared(self) -> Sequence[Placement]:
        num_wanted = min(self._most, self._demand.wanted(self._nodes))
        new = range(self._num_appeared, num_wanted)
        self._num_appeared = max(self._num_appeared, num_wanted)
        return [Placement(f"Ray {n}") for n in new]

    def start(self, placement: Placement, order: ReplicaOrder) -> RayReplica:
        self._replicas = [replica for replica in self._replicas if not replica.is_over]
        replica = RayReplica(self._actor.remote(), order, self._take_cores)
        self._replicas.append(replica)
        return replica

    @property
    def wait_s(self) -> float:
        return WAIT_S

    def lack(self) -> str:
        return f"{self._demand.lack(self._nodes)}, of which others may use some (`ray status`)"

    def close(self) -> None:
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        for replica in self._replicas:
            replica.kill()
        for replica in self._replicas:
            replica.join()
        _end(self._instance)

    def _take_cores(self, replica: RayReplica, spot: Spot) -> None:
        """On CPUs a replica has cores of its own, as Ray counts them and names none."""
        number = 0 if self._demand.share.gpus else self._demand.share.cpus
        with self._lock:
            others = [other for other in self._replicas if not other.is_gone]
            taken = {core for other in others for core in other.cores.get(spot.machine, ())}
            free = [core for core in spot.cores if core not in taken]
            if number <= len(free) and number < len(spot.cores):
                replica.cores = {spot.machine: free[:number]}

    def _look(self) -> None:
        """Asking waits where the cluster's head does not answer."""
        while not self._is_closed.wait(_LOOK_S):
            with suppress(Exception):
                self._nodes = _nodes() or self._nodes


class RayReplica:
    """See `Replica`. A thread of its own waits for the actor."""

    def __init__(
        self, actor: Any, order: ReplicaOrder, take_cores: Callable[[RayReplica, Spot], None]
    ) -> None:
        self._actor = actor
        self._order = order
        self._take_cores = take_cores
        self.cores: Mapping[str, Sequence[int]] = {}  # by machine; none: any
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        self._said: queue.SimpleQueue[FromReplica] = queue.SimpleQueue()
        self._is_killed = False
        self._where: str | None = None
        self._how: str | None = None
        self._thread = threading.Thread(target=self._follow, name="actor", daemon=True)
        self._thread.start()

    @property
    def where(self) -> str | None:
        return self._where

    def fileno(self) -> int:
        return self._ours.fileno()

    def send(self, message: ToReplica) -> None:
        with suppress(Exception):  # it is gone, as `is_gone` will show
            self._actor.send.options(concurrency_group="talk").remote(message)

    def messages(self) -> Iterator[FromReplica]:
        with suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass
        while not self._said.empty():
            yield self._said.get()

    @property
    def is_gone(self) -> bool:
        return self._how is not None

    @property
    def is_over(self) -> bool:
        """Nobody waits for the actor any more."""
        return not self._thread.is_alive()

    def how_ended(self) -> str:
        return self._how or "it was ended"

    def kill(self) -> None:
        if self._is_killed:
            return
        self._is_killed = True
        import ray

        with suppress(Exception):  # no cluster any more
            ray.kill(self._actor)
        self._ours.close()

    def join(self) -> None:
        self._thread.join(_END_S)

    def _follow(self) -> None:
        how = "it was ended"
        try:
            spot = self._await(self._actor.spot.remote())
            if spot.version != __version__:
                raise _Unfit(
                    f"batchinfer {spot.version} is installed on {spot.host} and {__version__} here"
                )
            self._take_cores(self, spot)
            order = replace(self._order, cores=tuple(self.cores.get(spot.machine, ())))
            launch = Launch(ReplicaProcess.module, carried(), str(Path.cwd()))
            pid = self._await(self._actor.start.remote(order, launch))
            self._where = f"process {pid} on {spot.host}"
            self._wake()
            how = self._listen()
        except _Killed:
            pass
        except Exception as error:
            how = _reason(error)
        self._how = how
        self._wake()

    def _listen(self) -> str:
        listen = self._actor.listen.options(concurrency_group="listen")
        while True:
            said, how = self._await(listen.remote())
            for message in said:
                self._said.put(message)
            if how is not None:
                return str(how)
            if said:
                self._wake()

    def _await(self, answer: Any) -> Any:
        import ray

        while not self._is_killed:
            if ray.wait([answer], timeout=_POLL_S)[0]:
                return ray.get(answer)
        raise _Killed

    def _wake(self) -> None:
        with suppress(OSError):  # there is enough to read already, or nobody reads any more
            self._theirs.send(b"\0")


class _Killed(Exception):
    """Nobody is interested any more."""


class _Unfit(Exception):
    """A node that cannot take part."""


def main(descriptor: str, folder: str) -> NoReturn:
    """Be the instance, until the one who started it has gone."""
    line = socket.socket(fileno=int(descriptor))
    ray = _import_ray()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=folder,
    )
    ignore_stops()
    line.sendall(json.dumps({"address": ray.get_runtime_context().gcs_address}).encode() + b"\n")
    with suppress(OSError):
        line.recv(1)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _import_ray() -> Any:
    try:
        import ray
    except Exception as error:
        raise import_failure("Ray", error) from error
    return ray


def _connect(address: str) -> None:
    # What processes print goes to the run's log, all of it and plainly.
    os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
    ray = _import_ray()
    ray._raylet.Config.initialize("")  # RAY_AUTH_MODE as it is now: others may have imported it
    if (why := why_unreachable(address)) is None:
        try:
            with kept_handlers():
                ray.init(address=address, logging_level="ERROR")
            return
        except Exception as error:
            why = _first_line(error)
    raise TransientError(
        f"there is no Ray cluster to be reached at {address} ({_ADDRESS}) from here: {why}. Start "
        "the command on one of its nodes, or one with `ray start`"
    )


def _end(instance: OwnInstance | None) -> None:
    """Leave the cluster. Ray may hang with it, and nothing depends on it."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, name="leave", daemon=True)
    leaving.start()
    leaving.join(_END_S)
    if instance is not None:
        instance.close()


def _actor_class(demand: Demand) -> Any:
    import ray

    actor = ray.remote(concurrency_groups={"talk": 1, "listen": 1})(Relay)
    takes = {"num_cpus": demand.share.cpus, "num_gpus": demand.share.gpus}
    return actor.options(**takes, max_restarts=0, max_task_retries=0)


def _nodes() -> list[Node]:
    import ray

    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _reason(error: Exception) -> str:
    """For people. Ray's errors have many lines; what happened is in one of them."""
    import ray

    if isinstance(error, _Unfit):
        return str(error)
    if isinstance(error, ray.exceptions.RayActorError):
        return f"its actor is gone ({_first_line(error)})"
    error = getattr(error, "cause", None) or error  # what was raised there
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("The actor is dead", "The actor died"))]
    return (told or lines or [repr(error)])[0][:300].rstrip(". ")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
