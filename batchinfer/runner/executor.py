"""What a job's `executor` names: whether it is there, and what it comes to.

Must not know: how it runs replicas.
"""

from __future__ import annotations

from importlib.util import find_spec

from batchinfer.config import Job
from batchinfer.engine.base import EngineKind
from batchinfer.errors import ConfigError


def check_executor(job: Job) -> None:
    """Raise ConfigError if what places the job's replicas is not installed here."""
    if job.executor == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "executor: ray needs Ray, which is not installed here: pip install 'batchinfer[ray]', "
            "on each node of the cluster, or set executor: local"
        )


def num_gpu_replicas(job: Job, kind: EngineKind) -> int:
    """How many replicas a forecast counts on, at least one. Several on a CPU share what one has; of
    a cluster it is those that the job asks for, as nobody knows what is free there later.

    Raises ConfigError.
    """
    if job.executor == "local":
        return max(1, sum(bool(place.gpus) for place in kind.placements(job)))
    devices, num_gpus = job.engine.devices, kind.num_gpus(job)
    return max(1, devices // num_gpus) if num_gpus and isinstance(devices, int) else 1
