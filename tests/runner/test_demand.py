"""How many replicas a cluster gets, and what each takes of a node."""

from __future__ import annotations

import pytest

from batchinfer.errors import ConfigError
from batchinfer.runner.replicas.demand import Node, Share, demand_of

BIG, SMALL = Node("a", cpus=64.0, gpus=8.0), Node("b", cpus=4.0, gpus=0.0)


def test_every_gpu_of_every_node_gets_a_replica_and_a_new_node_more() -> None:
    demand = demand_of("auto", 1, [BIG, SMALL])
    assert demand.share == Share(cpus=1, gpus=1)
    assert demand.wanted([BIG, SMALL]) == 8
    assert demand.wanted([BIG, SMALL, BIG]) == 16


def test_gpus_of_a_replica_are_of_one_node() -> None:
    three = Node("c", cpus=8.0, gpus=3.0)
    assert demand_of("auto", 2, [three, three]).wanted([three, three]) == 2
    assert demand_of("auto", 4, [three, three]).fitting([three, three]) == 0


def test_where_nothing_fits_one_replica_waits_and_what_lacks_is_said() -> None:
    demand = demand_of("auto", 2, [SMALL])
    assert demand.wanted([SMALL]) == 1
    assert demand.lack([SMALL]) == (
        "a replica takes 2 GPUs and 2 CPUs of one node, and the cluster has 0 GPUs and 4 CPUs on 1 "
        "node"
    )


def test_a_number_counts_gpus_whatever_is_there() -> None:
    assert demand_of(6, 2, [SMALL]).wanted([SMALL]) == 3
    with pytest.raises(ConfigError, match="give a multiple"):
        demand_of(5, 2, [BIG])


def test_on_cpus_a_replica_takes_the_largest_node_or_its_part_of_all() -> None:
    nodes = [Node("a", 8.0, 0.0), Node("b", 8.0, 0.0), SMALL]
    alone = demand_of("auto", 0, nodes)
    assert (alone.share, alone.wanted(nodes)) == (Share(cpus=8, gpus=0), 2)
    assert demand_of(10, 0, nodes).share.cpus == 2
    assert demand_of(1, 0, nodes).share.cpus == 8, "no more than a node has"
    assert demand_of(100, 0, nodes).share.cpus == 1
    assert demand_of("auto", 0, []).share.cpus == 1, "nodes may be on their way"
