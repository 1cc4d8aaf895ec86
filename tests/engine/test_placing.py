"""`engine.devices` as places: groups of GPUs by the names that CUDA knows, or a CPU's cores."""

from __future__ import annotations

import os

import pytest

from batchinfer.engine.base import Placement
from batchinfer.engine.placing import on_cores, on_gpus
from batchinfer.errors import ConfigError

FOUR = ["0", "1", "2", "3"]


def names(places: list[Placement]) -> list[str]:
    return [place.environ["CUDA_VISIBLE_DEVICES"] for place in places]


def test_auto_is_every_visible_gpu_in_groups() -> None:
    assert names(on_gpus("auto", FOUR, 1)) == FOUR
    assert names(on_gpus("auto", FOUR, 2)) == ["0,1", "2,3"]
    assert names(on_gpus("auto", FOUR[:3], 1)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("devices", "visible", "num_each"),
    [
        ("auto", [], 1),
        ("auto", ["0"], 1),
        ("auto", FOUR, 4),
        ("auto", FOUR[:3], 2),
        (1, FOUR, 1),
        (2, FOUR, 2),
        ([0], FOUR, 1),
        ([0, 1], FOUR, 2),
    ],
)
def test_where_one_engine_finds_its_gpus_by_itself_it_runs_in_this_process(
    devices: object, visible: list[str], num_each: int
) -> None:
    (place,) = on_gpus(devices, visible, num_each)  # type: ignore[arg-type]
    assert place.is_anywhere


def test_a_list_names_gpus_by_their_index_among_the_visible() -> None:
    uuids = ["GPU-aaaa", "GPU-bbbb", "MIG-cccc"]
    assert names(on_gpus([2, 0], uuids, 1)) == ["MIG-cccc", "GPU-aaaa"]
    assert names(on_gpus([1], uuids, 1)) == ["GPU-bbbb"]
    assert [place.gpus for place in on_gpus([2, 0], uuids, 1)] == [(2,), (0,)]


@pytest.mark.parametrize(
    ("devices", "num_each", "said"),
    [
        (5, 1, "asks for 5 devices, and 4 GPUs are visible"),
        ([1, 7], 1, "asks for GPU 7, and 4 GPUs are visible"),
        (3, 2, "names 3 GPUs, and a replica takes 2"),
        ("auto", 8, "takes 8 GPUs"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices: object, num_each: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        on_gpus(devices, FOUR, num_each)  # type: ignore[arg-type]


def test_replicas_on_a_cpu_share_its_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert on_cores("auto")[0].is_anywhere and on_cores(1)[0].is_anywhere
    if len(cores) >= 2:
        places = on_cores(2)
        assert sorted(core for place in places for core in place.cores) == cores
    with pytest.raises(ConfigError, match="at most one replica for each"):
        on_cores(len(cores) + 1)
    with pytest.raises(ConfigError, match="give a number"):
        on_cores([0])
