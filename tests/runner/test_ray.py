"""Ray places the replicas of a run: the same rows as on one device, whatever becomes of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.runner.test_replicas import NUM_ROWS, must_be_whole, write_input
from tests.support.jobs import Place, job, results, run, stable, write_job
from tests.support.ray_cluster import RayCluster, ray_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),  # one worker: the cluster is for the module
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head with one CPU, and one node more."""
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        cluster.add(1)
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
