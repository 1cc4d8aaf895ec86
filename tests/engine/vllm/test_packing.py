"""Whether a CPU keeps trellis codes packed: as asked, or where decoded they would not fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import Job
from batchinfer.engine.hardware import GIB, Memory
from batchinfer.engine.vllm.packing import with_packing
from batchinfer.engine.vllm.settings import VllmSettings, vllm_settings
from batchinfer.errors import ConfigError
from batchinfer.quantization import Machine
from batchinfer.runner.factory import engine_spec
from tests.support.jobs import MODEL, Place, job
from tests.support.models import read_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FLAGS = frozenset({"avx2", "fma", "f16c"})
CPU = Machine("cpu", cpu_flags=FLAGS, engine="vllm")
GPU = Machine("cuda", compute_capability=(9, 0), engine="vllm")


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.qtip_checkpoints import write_coded

    folder = tmp_path_factory.mktemp("coded") / "qtip"
    write_coded("qtip", folder)
    return folder


@pytest.fixture(autouse=True)
def _a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here; whether one could be is asked."""
    monkeypatch.setenv("CXX", sys.executable)


def settings_of(
    folder: Place,
    model: Path,
    asked: bool | str = "auto",
    *,
    machine: Machine = CPU,
    free_bytes: int = GIB,
) -> VllmSettings:
    of_model = {"path": str(model), "keep_packed": asked}
    found = Job.model_validate(job(folder, model=of_model))
    spec = engine_spec(found, read_model(str(model), machine=machine))
    memory = Memory(64 * GIB, free_bytes, is_gpu=machine.device == "cuda")
    return with_packing(vllm_settings(spec), spec, machine, (4, 64), memory)


def weights(settings: VllmSettings) -> int:
    assert settings.needs is not None
    return settings.needs.weights


def test_packed_weights_are_counted_as_they_lie_in_memory(folder: Place, coded: Path) -> None:
    """Of two layers of the demo model; decoded into float32, for want of bfloat16 instructions."""
    from safetensors import safe_open

    decoded = settings_of(folder, coded, False)
    packed = settings_of(folder, coded, True)
    assert packed.keeps_packed and not decoded.keeps_packed
    words = scales = values = 0
    with safe_open(coded / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            tensor, part = file.get_tensor(name), name.rpartition(".")[2]
            if part == "trellis":
                words += tensor.nbytes
                values += tensor.shape[0] * tensor.shape[1] * 256
            elif part in ("suh", "svh", "tlut"):
                scales += tensor.nbytes
    assert weights(decoded) - weights(packed) == 4 * values - words - 2 * scales


def test_they_stay_packed_by_themselves_only_where_decoded_ones_do_not_fit(
    folder: Place, coded: Path
) -> None:
    roomy = settings_of(folder, coded)
    assert not roomy.keeps_packed and not roomy.packing_note
    short = weights(roomy) + (1 << 20)  # too little for a step and the KV cache
    found = settings_of(folder, coded, free_bytes=short)
    assert found.keeps_packed and weights(found) < weights(roomy)
    assert found.packing_note.startswith("weights stay packed (")
    assert "decoded in every step, as decoded they take" in found.packing_note
    refused = settings_of(folder, coded, False, free_bytes=short)
    assert not refused.keeps_packed and weights(refused) == weights(roomy)


def test_without_instructions_or_compiler_they_are_decoded_and_counted_so(
    folder: Place, coded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = replace(CPU, cpu_flags=frozenset({"avx2"}))
    found = settings_of(folder, coded, True, machine=old)
    assert not found.keeps_packed
    assert found.packing_note == (
        "model.keep_packed: true has no effect here: the kernels for packed weights need a CPU "
        "with avx2, fma, f16c"
    )
    assert not settings_of(folder, coded, machine=old, free_bytes=1).packing_note
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = settings_of(folder, coded, True)
    assert "no effect here: there is no C++ compiler" in found.packing_note
    assert weights(found) == weights(settings_of(folder, coded, False))


def test_weights_that_the_engine_invents_are_kept_packed_too(folder: Place, coded: Path) -> None:
    """Nothing is known of what they take."""
    for asked in (True, "auto"):
        of_model = {"path": str(coded), "keep_packed": asked}
        found = Job.model_validate(job(folder, model=of_model))
        spec = engine_spec(found, replace(read_model(str(coded), machine=CPU), needs=None))
        settings = with_packing(vllm_settings(spec), spec, CPU, (4, 64), None)
        assert settings.keeps_packed is (asked is True) and not settings.packing_note


@pytest.mark.parametrize("asked", [True, False])
def test_other_models_are_refused_with_the_setting(folder: Place, asked: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"keep_packed is for models in qtip, exl3, and .* runs as none: lea"
    ):
        settings_of(folder, MODEL, asked)
    assert not settings_of(folder, MODEL).keeps_packed


def test_on_a_gpu_weights_are_always_packed(folder: Place, coded: Path) -> None:
    taken: list[Any] = [weights(settings_of(folder, coded, x, machine=GPU)) for x in (True, "auto")]
    assert taken[0] == taken[1]
    with pytest.raises(ConfigError, match="keep_packed: false is for a CPU"):
        settings_of(folder, coded, False, machine=GPU)
