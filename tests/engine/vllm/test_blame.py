"""Memory that other processes hold of a GPU: what is looked at, and whose fault a lack of it is."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.engine import crowd, hardware
from batchinfer.engine.crowd import Crowd, crowd_of
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.hardware import GIB, Gpu, GpuProcess, Memory
from batchinfer.engine.host import own_pids, process_name
from batchinfer.engine.vllm import blame as vllm_blame
from batchinfer.engine.vllm import errors as vllm_errors
from batchinfer.engine.vllm.blame import lack_of_memory, refuse_held, refuse_too_large
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError, EngineDied, MemoryHeld
from batchinfer.model import Needs
from batchinfer.quantization import Machine

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, where it is imported

TOTAL = 140 * GIB
SIZES = (256, 8192)
OURS = 10
#: About an 8B model in bfloat16 with 128 KiB of KV cache for a token.
NEEDS = Needs(
    weights=16 * GIB,
    kv_per_token=128 << 10,
    step_per_token=200_000,
    logits_per_row=128_000 * 22,
    num_heads=32,
    num_kv_shards=8,
    smaller={"fp8": 9 * GIB},
    caches_all_tokens=True,
)
SETTINGS = VllmSettings(
    model_path="m",
    tokenizer_path="m",
    dtype="bfloat16",
    max_model_len=8192,
    weights_bytes=16 * GIB,
    kv_bytes_per_token=128 << 10,
    demand=CompletionDemand("generate", SamplingSettings(max_tokens=16)),
    needs=NEEDS,
)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pids here are nobody's: this machine's own processes have no say."""
    monkeypatch.setattr(crowd, "process_name", {4711: "python3"}.get)


def gpu(*held: tuple[int, float], free_gib: float | None = None, label: str = "GPU 0") -> Gpu:
    """A device of 140 GiB on which each pid holds so many GiB."""
    processes = tuple(GpuProcess(pid, int(size * GIB)) for pid, size in held)
    taken = sum(process.used_bytes or 0 for process in processes)
    free = TOTAL - taken - GIB // 2 if free_gib is None else int(free_gib * GIB)
    return Gpu("NVIDIA H200", TOTAL, free, (9, 0), label=label, processes=processes)


def look(*devices: Gpu, **changes: Any) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)
    refuse_too_large(settings, SIZES, devices)
    refuse_held(settings, devices, {OURS})


# Before the model is loaded.


def test_memory_that_others_hold_is_reported_with_device_pid_and_bytes_and_passes() -> None:
    with pytest.raises(MemoryHeld) as caught:
        look(gpu((4711, 129)))
    told = str(caught.value)
    assert "m needs at least 15.4 GiB of GPU 0, and 10.5 GiB are free" in told
    assert f"process 4711 (python3) holds 129.0 GiB ({129 * GIB} bytes)" in told
    assert "CUDA_VISIBLE_DEVICES" in told
    assert caught.value.exit_code == 75


def test_what_others_leave_is_enough_if_all_that_is_certain_fits() -> None:
    look(gpu((4711, 70)))
    look(gpu((4711, 120)))  # perhaps not: then vLLM says so, and it is asked whose fault that is
    look(gpu())


def test_a_process_without_a_known_size_is_named() -> None:
    device = dataclasses.replace(gpu(free_gib=5), processes=(GpuProcess(99, None),))
    with pytest.raises(MemoryHeld, match="process 99 holds memory, how much is not shown"):
        look(device)


def test_processes_of_another_container_are_named_by_what_is_missing() -> None:
    with pytest.raises(MemoryHeld, match=r"not shown here .* hold 130\.0 GiB"):
        look(gpu(free_gib=10))


def test_many_processes_are_counted_beyond_the_largest() -> None:
    with pytest.raises(MemoryHeld) as caught:
        look(gpu(*((100 + n, 20 + n) for n in range(6)), free_gib=1))
    assert str(caught.value).index("process 105") < str(caught.value).index("process 104")
    assert "process 101" not in str(caught.value)
    assert "2 more processes" in str(caught.value)


def test_our_own_processes_hold_nothing_against_us() -> None:
    assert crowd_of(gpu((OURS, 100)), {OURS}).held_bytes == 0
    assert crowd_of(gpu(free_gib=20), {OURS}, own_bytes=119 * GIB).held_bytes == 0


def test_each_of_the_devices_that_share_the_model_is_looked_at() -> None:
    devices = gpu(), gpu((7, 138), label="GPU 1")
    with pytest.raises(MemoryHeld, match="of GPU 1"):
        look(*devices, tensor_parallel_size=2)


def test_too_large_for_an_empty_device_is_the_jobs_mistake_and_says_what_fits() -> None:
    with pytest.raises(ConfigError, match=r"even if nobody else used it.*max_model_len \d+") as e:
        look(gpu((4711, 30)), max_model_len=2_000_000)
    assert e.value.exit_code == 2
    huge = dataclasses.replace(NEEDS, weights=300 * GIB)
    with pytest.raises(ConfigError, match="tensor_parallel_size 4"):
        look(gpu(), needs=huge)


@pytest.mark.parametrize(
    "changes",
    [
        {"needs": dataclasses.replace(NEEDS, weights=129 * GIB)},  # estimates are from above
        {"needs": dataclasses.replace(NEEDS, caches_all_tokens=False), "max_model_len": 2_000_000},
        {"needs": None, "max_model_len": 2_000_000},
        {"needs": dataclasses.replace(NEEDS, weights=160 * GIB), "cpu_offload_gib": 40.0},
    ],
)
def test_what_may_fit_is_left_to_the_engine(changes: dict[str, Any]) -> None:
    look(gpu(), **changes)


def test_a_share_that_is_not_free_is_reported_before_vllm_refuses_it() -> None:
    with pytest.raises(MemoryHeld, match=r"utilization 0\.9 asks for 126\.0 GiB.*process 5 ") as e:
        look(gpu((5, 60)), gpu_memory_utilization=0.9)
    assert "auto would take what others leave" in str(e.value)
    look(gpu((5, 60)), gpu_memory_utilization=0.5)


def test_a_cache_of_a_given_size_is_not_bound_by_the_share() -> None:
    large = dataclasses.replace(NEEDS, weights=145 * GIB)
    with pytest.raises(ConfigError):
        look(gpu(), needs=large)
    look(gpu(), needs=large, options={"kv_cache_memory_bytes": GIB})


@pytest.mark.parametrize(("num_devices", "num_found"), [(2, 2), (3, 0)])
def test_devices_that_are_not_all_here_are_left_to_vllm(
    num_devices: int, num_found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        vllm_blame,
        "this_machine",
        lambda: Machine("cuda", compute_capability=(9, 0), engine="vllm"),
    )
    monkeypatch.setattr(vllm_blame, "gpus", lambda: [gpu(), gpu(label="GPU 1")])
    settings = dataclasses.replace(SETTINGS, tensor_parallel_size=num_devices)
    assert len(vllm_blame.devices_of(settings)) == num_found


def test_a_full_device_is_reported_even_for_a_tiny_model() -> None:
    tiny = dataclasses.replace(NEEDS, weights=14 << 20)
    with pytest.raises(MemoryHeld, match="process 5 "):
        look(gpu((5, 138.5)), needs=tiny)
    look(gpu((5, 129)), needs=tiny)  # 10 GiB are enough for it


# After a failure.


def blame(*devices: Gpu, **changes: Any) -> Exception:
    settings = dataclasses.replace(SETTINGS, **changes)
    crowds = [crowd_of(device, {OURS}) for device in devices]
    return lack_of_memory(settings, SIZES, crowds, None, "it failed", "(so)")


def test_others_are_to_blame_if_the_job_would_fit_without_them() -> None:
    assert isinstance(blame(gpu((OURS, 20), (7, 119))), MemoryHeld)
    assert isinstance(blame(gpu((OURS, 60), (7, 79))), MemoryHeld)  # it would fit, it did not
    assert isinstance(blame(gpu((OURS, 100)), gpu((7, 130))), MemoryHeld)
    assert "process 7 holds 119.0 GiB" in str(blame(gpu((OURS, 20), (7, 119))))


def test_the_job_is_to_blame_if_it_would_not_fit_alone_or_nobody_else_is_there() -> None:
    assert isinstance(blame(gpu((OURS, 139))), ConfigError)
    assert isinstance(blame(gpu((OURS, 120), (7, 0.3))), ConfigError)  # a display
    assert isinstance(blame(gpu((OURS, 100), (7, 5))), ConfigError)  # 3 %, and it would fit
    found = blame(gpu((OURS, 100), (7, 30)), max_model_len=2_000_000)
    assert isinstance(found, ConfigError)
    assert "What would fit: model.max_model_len" in str(found)


def test_without_an_estimate_or_a_device_the_settings_are_named() -> None:
    assert isinstance(blame(gpu((OURS, 20), (7, 100)), needs=None), MemoryHeld)
    assert "engine.max_num_seqs (now 256)" in str(blame(gpu((OURS, 130)), needs=None))
    assert "engine.max_num_seqs (now 256)" in str(blame())


# What vLLM raises.


class InductorError(Exception):
    """As torch's: its text repeats the error that it was raised for."""


def out_of_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


LACKS = [
    out_of_memory,
    lambda: raised(InductorError("LoweringException"), out_of_memory()),
    lambda: InductorError("OutOfMemoryError: CUDA out of memory. Tried to allocate"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    lambda: RuntimeError("CUDA error: out of memory"),
    lambda: RuntimeError("Worker failed with error 'CUDA out of memory. Tried', please check"),
    lambda: RuntimeError("NCCL error: Cuda failure 2 'out of memory'"),
    lambda: RuntimeError("CUDA driver error: out of memory"),
    lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
    lambda: ValueError("No available memory for the cache blocks. Try increasing"),
    lambda: ValueError("Free memory on device is less than desired GPU memory utilization"),
]


@pytest.mark.parametrize("make", LACKS)
@pytest.mark.slow
@pytest.mark.parametrize("is_held", [True, False])
def test_a_lack_of_memory_is_recognized_in_whatever_phase_and_wrapping(
    make: Any, is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = gpu((OURS, 10), (4711, 129)) if is_held else gpu((OURS, 139))
    crowds: list[Crowd] = [crowd_of(devices, {OURS})]
    monkeypatch.setattr(vllm_errors, "crowds_now", lambda settings: crowds)
    arguments = {"model": "m", "max_num_seqs": SIZES[0], "max_num_batched_tokens": SIZES[1]}
    start = vllm_errors.construction_error(make(), arguments, SETTINGS, Memory(TOTAL, TOTAL))
    step = vllm_errors.step_error(make(), SETTINGS, SIZES, is_worker_dead=False, is_killed=False)
    assert isinstance(start, MemoryHeld if is_held else ConfigError), start
    assert isinstance(step, EngineDied if is_held else ConfigError), step
    for found in (start, step):
        assert ("process 4711 (python3) holds 129.0 GiB" in str(found)) == is_held
        assert ("it needs about 16.0 GiB for weights" in str(found)) != is_held


@pytest.mark.slow
def test_a_silent_worker_failed_for_memory_if_others_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that does not tell its error failed of memory if others leave too little."""
    settings = dataclasses.replace(SETTINGS, tensor_parallel_size=2)
    arguments = {"model": "m", "max_num_seqs": SIZES[0], "max_num_batched_tokens": SIZES[1]}
    error = Exception("WorkerProc initialization failed due to an exception in a background")

    def found(*devices: Gpu) -> Exception:
        crowds = [crowd_of(device, {OURS}) for device in devices]
        monkeypatch.setattr(vllm_errors, "crowds_now", lambda _: crowds)
        return vllm_errors.construction_error(error, arguments, settings, Memory(TOTAL, TOTAL))

    assert isinstance(found(gpu(), gpu((7, 135))), MemoryHeld)
    assert isinstance(found(gpu(), gpu()), EngineDied)


def test_memory_given_back_while_vllm_measures_passes() -> None:
    error = AssertionError("Error in memory profiling. Initial free memory 10 GiB, current 20 GiB")
    arguments = {"model": "m", "max_num_seqs": 1, "max_num_batched_tokens": 1}
    found = vllm_errors.construction_error(error, arguments, SETTINGS, None)
    assert isinstance(found, MemoryHeld)


@pytest.mark.slow
def test_a_failure_is_named_by_its_phase_and_its_cause() -> None:
    def load_model() -> None:
        raise KeyError("layers.0.weight")

    try:
        load_model()
    except KeyError as caught:
        error = caught
    arguments = {"model": "m", "max_num_seqs": 1, "max_num_batched_tokens": 1}
    found = vllm_errors.construction_error(error, arguments, SETTINGS, None)
    assert re.search(r"KeyError: 'layers.*test_blame.*\(while loading the weights\)$", str(found))


def test_a_package_that_is_not_there_is_not_the_settings_fault() -> None:
    error = ModuleNotFoundError("No module named 'ijson'", name="ijson")
    arguments = {"model": "m", "max_num_seqs": 1, "max_num_batched_tokens": 1}
    wrapped = raised(RuntimeError("Failed to load the parser"), error)
    for failed in (error, wrapped):
        found = vllm_errors.construction_error(failed, arguments, SETTINGS, None)
        assert isinstance(found, ConfigError)
        assert "the Python package ijson is not installed" in str(found)


def test_a_worker_that_the_kernel_ended_died_of_the_hosts_memory() -> None:
    found = vllm_errors.step_error(
        RuntimeError("cancelled"), SETTINGS, SIZES, is_worker_dead=True, is_killed=True
    )
    assert isinstance(found, EngineDied)
    assert "the host ran out of memory" in str(found)


# What is asked of the machine.


class FakeNvml:
    """The driver's management library: one device, on which three processes compute."""

    may_list = True

    def nvmlInit_v2(self) -> int:
        return 0

    nvmlShutdown = nvmlInit_v2

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = 1
        return 0

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any, parent: Any) -> int:
        return 2  # not one

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: int) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = TOTAL, GIB
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, found: Any) -> int:
        if not self.may_list:
            return 4  # no permission
        found[0].pid, found[0].used = 4711, 129 * GIB
        found[1].pid, found[1].used = 12, 2**64 - 1
        found[2].pid, found[2].used = 0, GIB  # of another container
        count._obj.value = 3
        return 0


@pytest.mark.parametrize("may_list", [True, False])
def test_the_driver_is_asked_for_processes(may_list: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.may_list = may_list
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = hardware.gpus()
    assert found.label == "GPU 0"
    told = (GpuProcess(4711, 129 * GIB), GpuProcess(12, None)) if may_list else ()
    assert found.processes == told


def test_our_processes_are_we_and_all_that_descend_from_us() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        assert {os.getpid(), child.pid} <= own_pids()
        assert os.getppid() not in own_pids()
        child.communicate(b"\n")


def test_a_process_is_named_as_the_kernel_has_it() -> None:
    assert process_name(os.getpid())
    assert process_name(2**22 + 1) is None
