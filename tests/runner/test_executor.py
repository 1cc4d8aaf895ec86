"""`executor: ray` where it cannot be, and what a forecast takes it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import Job
from batchinfer.errors import ConfigError
from batchinfer.runner import executor
from batchinfer.testing import FakeKind, fake_kind
from tests.support.jobs import Place, job


def job_on_ray(folder: Path, devices: Any) -> Job:
    settings = job(Place(str(folder)), executor="ray", engine={"devices": devices})
    settings["input"]["path"] = [settings["input"]["path"]]
    return Job.model_validate(settings)


def test_without_ray_the_job_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'batchinfer\[ray\]'"):
        executor.check_executor(job_on_ray(tmp_path, "auto"))


def test_a_list_of_devices_means_nothing_in_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.devices: lists indices of GPUs of one machine"):
        job_on_ray(tmp_path, [0, 1])


def test_a_forecast_counts_the_gpus_that_the_job_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert executor.num_gpu_replicas(job_on_ray(tmp_path, 6), fake_kind()) == 1, "on CPUs"
    monkeypatch.setattr(FakeKind, "num_gpus", lambda self, job: 2)
    assert executor.num_gpu_replicas(job_on_ray(tmp_path, 6), fake_kind()) == 3
    assert executor.num_gpu_replicas(job_on_ray(tmp_path, "auto"), fake_kind()) == 1
