"""A Ray cluster of several nodes on this machine, in a process of its own. A double for a real one.

    python -m tests.support.ray_cluster FOLDER

It reads commands, one a line, and answers each with a line of JSON: `add CPUS` starts a node and
tells its number, `remove N` ends one. It ends, and the cluster with it, when nothing can be read.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.forks import ROOT, python_path
from tests.support.processes import children_of


class RayCluster:
    """Reached from tests."""

    def __init__(self, folder: Path) -> None:
        token = secrets.token_hex(32)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        own = {"PYTHONPATH": python_path(), "RAY_USAGE_STATS_ENABLED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.ray_cluster", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | auth | own,
            start_new_session=True,
            cwd=ROOT,
        )
        head = self._answer()
        self.environ = auth | {"RAY_ADDRESS": head["address"]}
        self.raylets: list[int] = [head["raylet"]]  # of nodes that stay; processes

    def add(self, num_cpus: int, *, stays: bool = False) -> dict[str, Any]:
        """-> its `number`, and `raylet`, a process id."""
        node = self._ask(f"add {num_cpus}")
        if stays:
            self.raylets.append(node["raylet"])
        return node

    def remove(self, number: int) -> None:
        self._ask(f"remove {number}")

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster is gone: see what it printed"
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextmanager
def ray_cluster(folder: Path) -> Iterator[RayCluster]:
    cluster = RayCluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def replicas_of(raylet: int) -> list[int]:
    """The processes below the actors of a node: those that compute."""
    return [replica for actor in children_of(raylet) for replica in children_of(actor)]


def raylet_of(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints
    from ray.cluster_utils import Cluster

    def answer(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    common = {"include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **common})
    nodes = []
    answer(address=cluster.address, raylet=raylet_of(cluster.head_node))
    for line in sys.stdin:
        command, number = line.split()
        if command == "add":
            node = cluster.add_node(num_cpus=int(number), object_store_memory=80 << 20)
            nodes.append(node)
            answer(number=len(nodes) - 1, raylet=raylet_of(node))
        else:
            cluster.remove_node(nodes[int(number)], allow_graceful=False)
            answer(removed=int(number))
    cluster.shutdown()


if __name__ == "__main__":
    main()
