"""Whether what a job's `executor` names is there. Must not know: how it runs replicas."""

from __future__ import annotations

from importlib.util import find_spec

from batchinfer.config import Job
from batchinfer.errors import ConfigError


def check_executor(job: Job) -> None:
    """Raise ConfigError if what places the job's replicas is not installed here."""
    if job.executor == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "executor: ray needs Ray, which is not installed here: pip install 'batchinfer[ray]', "
            "on each node of the cluster, or set executor: local"
        )
