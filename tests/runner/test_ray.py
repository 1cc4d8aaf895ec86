"""Ray places the replicas of a run: the same rows as on one device, whatever becomes of nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.runner.test_replicas import (
    NUM_ROWS,
    SLOW,
    STEPPING,
    await_engines,
    must_be_whole,
    write_input,
)
from tests.support.jobs import (
    Place,
    job,
    results,
    run,
    stable,
    start,
    wait,
    wait_until,
    write_job,
)
from tests.support.processes import await_end, children_of, descendants_of, kill_one
from tests.support.ray_cluster import RayCluster, ray_cluster, replicas_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),  # one worker: the cluster is for the module
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head with one CPU, and one node more."""
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        cluster.add(1, stays=True)
        yield cluster


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What one device gives."""
    folder = tmp_path_factory.mktemp("reference")
    place = Place(str(folder / "data"))
    write_input(place)
    ended = run(write_job(folder, job(place, engine={"name": "fake"})))
    assert ended.code == 0, ended.stderr
    return stable(results(place))


def on_ray(place: Place, folder: Path, devices: Any = "auto") -> Path:
    engine = {"name": "fake", "devices": devices}
    return write_job(folder, job(place, executor="ray", engine=engine))


def test_nodes_of_a_cluster_share_a_job(
    folder: Place, tmp_path: Path, cluster: RayCluster, reference: pl.DataFrame
) -> None:
    write_input(folder)
    ended = run(on_ray(folder, tmp_path), fake={"step_s": 0.005}, environ=cluster.environ)
    assert ended.code == 0, ended.stderr
    must_be_whole(folder, reference)
    assert len(ended.stdout.splitlines()) == 1
    assert ended.result["rows_computed"] == sum(NUM_ROWS)
    assert ended.stderr.count("replica started: Ray ") == 2
    computed = [line for line in ended.stderr.splitlines() if " computed rows=" in line]
    assert len(computed) == 2 and not any("rows=0 " in line for line in computed)


def test_a_node_that_joins_gets_work_and_one_that_is_gone_is_not_missed(
    folder: Place, tmp_path: Path, cluster: RayCluster, reference: pl.DataFrame
) -> None:
    """As is a replica that is killed."""
    write_input(folder)
    environ = {**cluster.environ, "FAKE_SILENT_S": "600"}
    process = start(on_ray(folder, tmp_path), fake=SLOW, environ=environ)
    first, second = cluster.raylets
    wait_until(lambda: folder.parts(), what="a durable row")
    wait_until(lambda: replicas_of(first) and replicas_of(second), what="a replica on each node")
    halted = replicas_of(first) + replicas_of(second)  # so that work is left for who joins
    for pid in halted:
        os.kill(pid, signal.SIGSTOP)
    joined = cluster.add(1)
    wait_until(lambda: replicas_of(joined["raylet"]), what="a replica on the node that joined")
    late = replicas_of(joined["raylet"])
    os.kill(halted[0], signal.SIGKILL)
    cluster.remove(joined["number"])
    os.kill(halted[1], signal.SIGCONT)
    ended = wait(process)
    assert ended.code == 0, ended.stderr
    assert "its process is gone (ended by SIGKILL)" in ended.stderr
    assert ended.stderr.count("replica started: Ray 2") == 1
    await_end(*late, timeout_s=40)
    must_be_whole(folder, reference)


def test_a_frozen_node_loses_nothing_and_its_work_goes_to_others(
    folder: Place, tmp_path: Path, cluster: RayCluster, reference: pl.DataFrame
) -> None:
    """Nothing of it runs any more: its raylet, the actor, the replica, as if it were cut off."""
    write_input(folder)
    environ = {**cluster.environ, "FAKE_SILENT_S": "3"}
    process = start(on_ray(folder, tmp_path), fake=STEPPING, environ=environ)
    raylet = cluster.raylets[-1]
    await_engines(folder, 2)
    ours = [*replicas_of(raylet), *(pid for pid in children_of(raylet) if children_of(pid))]
    frozen = [raylet, *ours]
    for pid in frozen:
        kill_one(pid, signal.SIGSTOP)
    try:
        ended = wait(process)
    finally:
        for pid in frozen:
            kill_one(pid, signal.SIGCONT)
    assert ended.code == 0, ended.stderr
    assert "nothing was heard of it for 3 s" in ended.stderr
    assert "_SUCCESS" in folder.names("out")
    await_end(*ours, timeout_s=60)  # it wakes up, and what it does then harms nothing
    assert stable(results(folder)).equals(reference)


def test_sigterm_to_a_run_with_ray_of_its_own_makes_durable_what_is_finished(
    folder: Place, tmp_path: Path, reference: pl.DataFrame
) -> None:
    """The signal goes to the group, as schedulers send it; nothing of Ray is left."""
    write_input(folder)
    path = on_ray(folder, tmp_path, 2)
    environ = {"RAY_ADDRESS": "", "TMPDIR": str(tmp_path)}
    process = start(path, fake=SLOW, environ=environ)
    wait_until(lambda: folder.parts(), 200, what="a durable row")
    below = descendants_of(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    begun_s = time.monotonic()
    ended = wait(process)
    assert ended.code == 143, ended.stderr
    assert time.monotonic() - begun_s < 20
    assert ended.result["rows"] == ended.result["rows_computed"] > 0
    await_end(*below, timeout_s=30)
    assert run(write_job(tmp_path, job(folder, engine={"name": "fake"}))).code == 0
    must_be_whole(folder, reference)


def test_after_the_run_is_killed_nothing_computes_and_the_next_start_goes_on(
    folder: Place, tmp_path: Path, cluster: RayCluster, reference: pl.DataFrame
) -> None:
    write_input(folder)
    process = start(on_ray(folder, tmp_path), fake=SLOW, environ=cluster.environ)
    wait_until(lambda: folder.parts(), what="a durable row")
    replicas = [pid for raylet in cluster.raylets for pid in replicas_of(raylet)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    await_end(*replicas, timeout_s=40)
    before = sum(folder.read_parquet(f"out/{part}").height for part in folder.parts())
    ended = run(write_job(tmp_path, job(folder, engine={"name": "fake"})))
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] <= sum(NUM_ROWS) - before
    must_be_whole(folder, reference)


def test_what_the_cluster_lacks_is_named_after_a_bounded_wait(
    folder: Place, tmp_path: Path, cluster: RayCluster
) -> None:
    write_input(folder)
    environ = {**cluster.environ, "FAKE_WAIT_S": "3", "FAKE_GPUS": "2"}
    ended = run(on_ray(folder, tmp_path), environ=environ)
    assert ended.code == 75, ended.stderr
    message = ended.result["message"]
    assert "a replica takes 2 GPUs and 2 CPUs of one node, and the cluster has 0 GPUs" in message


def test_a_cluster_that_is_not_there_is_said(folder: Place, tmp_path: Path) -> None:
    write_input(folder)
    path = on_ray(folder, tmp_path)
    ended = run(path, environ={"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "disabled"})
    assert ended.code == 75, ended.stderr
    assert "no Ray cluster to be reached at 127.0.0.1:1 (RAY_ADDRESS)" in ended.result["message"]
    ended = run(path, environ={"RAY_ADDRESS": "ray://head:10001"})
    assert ended.code == 2, ended.stderr
    assert "with RAY_ADDRESS=auto" in ended.result["message"]
