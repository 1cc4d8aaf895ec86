"""`engine.devices` as places for replicas: groups of GPUs, or shares of a CPU's cores.

Must not know: engines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from batchinfer.engine.base import Placement
from batchinfer.errors import ConfigError

_KEY = "engine.devices"


def on_gpus(
    devices: int | str | Sequence[int], visible: Sequence[str], num_each: int
) -> list[Placement]:
    """`visible`: the names of the GPUs, none where there is none to be seen; `num_each`: how many
    GPUs a replica takes.

    Raises ConfigError.
    """
    if 0 < len(visible) < num_each:
        raise ConfigError(
            f"an engine of this job takes {num_each} GPUs (model.tensor_parallel_size times "
            f"model.pipeline_parallel_size), and {_there(visible)}: lower them"
        )
    if isinstance(devices, str):
        if len(visible) < 2 * num_each:
            return [Placement("all devices")]
        chosen = list(visible)
    else:
        chosen = _chosen(devices, visible, num_each)
    groups = [chosen[n : n + num_each] for n in range(0, len(chosen) - num_each + 1, num_each)]
    if len(groups) == 1 and groups[0] == list(visible[:num_each]):
        return [Placement(_label(groups[0]))]  # as an engine takes them by itself
    return [
        Placement(
            _label(names),
            {"CUDA_VISIBLE_DEVICES": ",".join(names)},
            gpus=tuple(map(visible.index, names)),
        )
        for names in groups
    ]


def _chosen(devices: int | Sequence[int], visible: Sequence[str], num_each: int) -> list[str]:
    indices = range(devices) if isinstance(devices, int) else devices
    if missing := [index for index in indices if index >= len(visible)]:
        what = f"GPU {missing[0]}" if not isinstance(devices, int) else f"{devices} devices"
        raise ConfigError(
            f"{_KEY} asks for {what}, and {_there(visible)}: choose among those, or set it to auto"
        )
    if len(indices) % num_each:
        raise ConfigError(
            f"{_KEY} names {len(indices)} GPUs, and a replica takes {num_each} "
            "(model.tensor_parallel_size): give a multiple of that"
        )
    return [visible[index] for index in indices]


def _there(visible: Sequence[str]) -> str:
    are = "one GPU is" if len(visible) == 1 else f"{len(visible)} GPUs are"
    return f"{are} visible here (nvidia-smi, CUDA_VISIBLE_DEVICES)"


def _label(names: Sequence[str]) -> str:
    return f"GPU {'+'.join(names)}"


def on_cores(devices: int | str | Sequence[int]) -> list[Placement]:
    """Replicas on this CPU, each with its share of the cores. Raises ConfigError."""
    if isinstance(devices, str) or devices == 1:
        return [Placement("CPU")]
    if not isinstance(devices, int):
        raise ConfigError(
            f"{_KEY} lists indices of GPUs, and the engine runs on the CPU here: give a number of "
            "replicas, which share its cores, or auto"
        )
    cores = sorted(os.sched_getaffinity(0))
    if devices > len(cores):
        raise ConfigError(
            f"{_KEY} asks for {devices} replicas, and this process may use {len(cores)} cores of "
            "the CPU: at most one replica for each"
        )
    bounds = [len(cores) * n // devices for n in range(devices + 1)]
    return [
        Placement(f"CPU share {n + 1}", cores=tuple(cores[bounds[n] : bounds[n + 1]]))
        for n in range(devices)
    ]
