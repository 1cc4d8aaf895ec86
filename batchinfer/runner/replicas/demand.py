"""What replicas ask of a cluster, by what it has. Pure. Must not know: which cluster.

The unit is Ray's: a node says how many GPUs and CPUs it has, a replica how many it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica takes."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        gpus = f"{_count(self.gpus, 'GPU')} and " if self.gpus else ""
        return gpus + _count(self.cpus, "CPU")


@dataclass(frozen=True, slots=True)
class Demand:
    """How many replicas there may be, each with the same share. `number` None: all that fit."""

    share: Share
    number: int | None

    def wanted(self, nodes: Sequence[Node]) -> int:
        """How many to start, at least one: that nothing fits is seen by whoever waits for it."""
        return self.fitting(nodes) or 1 if self.number is None else self.number

    def fitting(self, nodes: Sequence[Node]) -> int:
        """How many would fit if nobody else used the cluster."""
        return sum(_fitting(self.share, node) for node in nodes)

    def lack(self, nodes: Sequence[Node]) -> str:
        """For people: what there is, beside what is asked for."""
        gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
        has = f"{_count(gpus, 'GPU')} and {_count(cpus, 'CPU')} on {_count(len(nodes), 'node')}"
        return f"a replica takes {self.share} of one node, and the cluster has {has}"


def demand_of(devices: int | str, num_gpus: int, nodes: Sequence[Node]) -> Demand:
    """Of a job's `engine.devices`, where a replica takes `num_gpus`; 0: it computes on the CPU.

    On CPUs a replica has as many as the largest node for `auto`, else its part of all. Raises
    ConfigError.
    """
    if num_gpus:
        if isinstance(devices, int) and devices % num_gpus:
            raise ConfigError(
                f"engine.devices asks for {devices} GPUs, and a replica takes {num_gpus} "
                "(model.tensor_parallel_size): give a multiple of that"
            )
        number = devices // num_gpus if isinstance(devices, int) else None
        return Demand(Share(cpus=num_gpus, gpus=num_gpus), number)
    cpus = [math.floor(node.cpus) for node in nodes]
    largest = max(1, *cpus, 1)
    if not isinstance(devices, int):
        return Demand(Share(cpus=largest, gpus=0), None)
    return Demand(Share(cpus=min(largest, max(1, sum(cpus) // devices)), gpus=0), devices)


def _fitting(share: Share, node: Node) -> int:
    by_cpus = int(node.cpus // share.cpus)
    return min(by_cpus, int(node.gpus // share.gpus)) if share.gpus else by_cpus


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
