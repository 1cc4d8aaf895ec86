"""What several commands share: a job looked at as `run` does.

Writes nothing.
"""

from __future__ import annotations

import logging

from batchinfer.cli.places import explained_places
from batchinfer.config import Job
from batchinfer.runner.examine import ExaminedJob, examine
from batchinfer.runner.start import open_start

logger = logging.getLogger("batchinfer.cli")


def never() -> bool:
    return False


def look_at(job: Job, job_path: str | None) -> ExaminedJob:
    """Check model folder, input and output as `run` does. `job_path` None: without a job file.

    Raises ConfigError, InputError.
    """
    with explained_places(job, job_path):
        start = open_start(job)
        for warning in start.model.warnings:
            logger.warning("%s", warning)
        return examine(start)
