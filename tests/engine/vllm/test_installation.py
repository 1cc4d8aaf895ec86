"""Faults of the installation and of the environment are told as such, before anything loads."""

from __future__ import annotations

import importlib.util
import logging
import os
from importlib import metadata
from pathlib import Path

import pytest

from batchinfer.engine.vllm import installation
from batchinfer.engine.vllm.installation import check_variables, installation_fault
from batchinfer.errors import ConfigError
from batchinfer.imports import import_failure
from tests.support.endings import must_fail
from tests.support.jobs import ROOT, Place, job, rows, run, write_job


@pytest.fixture
def small(folder: Place, tmp_path: Path) -> Path:
    folder.write_parquet("in/s0.parquet", rows(2))
    return write_job(tmp_path, job(folder))


def broken(folder: Path, module: str, line: str) -> dict[str, str]:
    """An environment in which importing `module` runs `line`."""
    path = folder / "broken" / f"{module}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    return {"PYTHONPATH": f"{path.parent}:{ROOT}", "FAKE_REAL_TOKENIZER": "1"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("transformers", "raise ImportError('libgone.so: no such file')"),
        ("tokenizers", "raise RuntimeError('operator gone::nms does not exist')"),
        ("huggingface_hub", "LIMIT = int('abc')"),
    ],
)
def test_a_package_that_cannot_be_imported_is_not_a_fault_of_the_model(
    module: str, line: str, small: Path, tmp_path: Path
) -> None:
    ended = run(small, environ=broken(tmp_path, module, line))
    cause = line.partition("'")[2].partition("'")[0]
    must_fail(ended, 2, "cannot be imported", cause, "installation")
    assert "Copy its files" not in ended.stderr


def test_an_engine_that_cannot_be_imported_is_reported_with_its_first_cause(
    small: Path, tmp_path: Path
) -> None:
    environ = broken(tmp_path, "torch", "raise ImportError('libcudart.so.13: no such file')")
    ended = run(small, environ=environ, engine="real")
    must_fail(ended, 2, "cannot be imported", "libcudart.so.13: no such file", "installation")
    doctor = run("doctor", command=(), environ=environ, engine="real")
    assert doctor.code == 2 and "libcudart.so.13" in doctor.stdout


def test_doctor_names_the_first_cause_whatever_an_import_raises(tmp_path: Path) -> None:
    environ = broken(tmp_path, "tokenizers", "raise RuntimeError('operator gone::nms')")
    doctor = run("doctor", command=(), environ=environ, engine="real")
    assert doctor.code == 2 and "operator gone::nms" in doctor.stdout
    assert "Traceback" not in doctor.stderr


@pytest.mark.parametrize("value", ["abc", "it's 10"])
def test_a_variable_that_a_library_cannot_read_is_named(
    value: str, small: Path, tmp_path: Path
) -> None:
    """huggingface_hub reads its timeouts as it is imported."""
    line = "import os; int(os.environ['HF_HUB_DOWNLOAD_TIMEOUT'])"
    environ = broken(tmp_path, "huggingface_hub", line) | {"HF_HUB_DOWNLOAD_TIMEOUT": value}
    ended = run(small, environ=environ)
    must_fail(ended, 2, repr(value), "HF_HUB_DOWNLOAD_TIMEOUT", "correct it or unset it")
    assert "reinstall" not in ended.stderr


@pytest.mark.parametrize(
    "message",
    [
        "Invalid log settings: loud, must be a list",
        "The value of TORCH_LOGS must be OFF or INFO",
        "Invalid log settings: loud",
    ],
)
def test_a_variable_is_found_however_a_library_puts_it(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_LOGS", "loud")
    assert "variable TORCH_LOGS" in str(import_failure("vLLM", ValueError(message)))


@pytest.mark.parametrize(
    "message", ["invalid literal for int(): 'sesame'", 'no "sesame" here', "cannot read: sesame"]
)
def test_the_value_of_a_secret_is_not_told(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    told = str(import_failure("vLLM", ValueError(message)))
    assert "VLLM_API_KEY" in told and "sesame" not in told


def test_a_value_that_a_message_holds_by_chance_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "torch")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "")
    for error in (ImportError("No module named 'torch'"), ValueError("torch has no operator ''")):
        assert "reinstall" in str(import_failure("vLLM", error))


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(installation, "gpus", list)
    monkeypatch.setattr(installation, "_has_cuda_driver", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_torch_of_another_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm="0.32.0", torch="2.13.0+cpu")
    fault = installation_fault()
    assert fault is not None
    assert "torch 2.13.0+cpu is the CPU build, vLLM 0.32.0 the CUDA build" in fault


def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm="0.32.0", torch="2.13.0")
    assert "no GPU is visible" in (installation_fault() or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(installation, "_has_cuda_driver", lambda: True)
    assert "CUDA_VISIBLE_DEVICES hides them all" in (installation_fault() or "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert installation_fault() is None  # a driver is there: what it has, vLLM finds out


def test_matching_builds_are_not_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **{"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"})
    assert installation_fault() is None
    pretend(monkeypatch, vllm="0.32.0+rocm7", torch="2.13.0+rocm7")
    assert installation_fault() is None
    pretend(monkeypatch, torch="2.13.0")
    assert "vLLM is not installed" in (installation_fault() or "")


def test_what_kubernetes_sets_for_a_service_of_that_name_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_PORT", "tcp://10.1.2.3:8000")
    monkeypatch.setenv("VLLM_SERVICE_HOST", "10.1.2.3")
    with caplog.at_level(logging.INFO):
        check_variables()
    assert "VLLM_PORT" not in os.environ
    assert [record.message for record in caplog.records] == [
        "VLLM_PORT=tcp://10.1.2.3:8000 is of a Kubernetes service, not for vLLM: ignored"
    ]


def test_a_variable_that_vllm_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM's list of variables")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "plenty")
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE='plenty' is not one that vLLM"):
        check_variables()


def test_a_variable_that_holds_a_secret_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read() -> int:
        return int(os.environ["VLLM_API_KEY"])

    monkeypatch.setattr(installation, "_variable_readers", lambda: {"VLLM_API_KEY": read})
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    with pytest.raises(ConfigError, match="VLLM_API_KEY=") as caught:
        check_variables()
    assert "sesame" not in str(caught.value)
