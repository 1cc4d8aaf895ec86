"""CPUs without AVX-512, or without its bfloat16: which kernels vLLM has there, what is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchinfer.cli.doctor import show_kv_caches, show_quantizations
from batchinfer.engine.cpu_library import cpu_library, registered_operators
from batchinfer.engine.hardware import cpu_flags
from batchinfer.errors import ConfigError, EngineDied
from batchinfer.quantization import Checkpoint, choose, choose_kv_cache
from tests.support.cpus import CPUS, FLAGS, LIBRARIES, environment
from tests.support.jobs import ROOT

#: What this machine can stand in for: CPUs that have less.
HERE = [cpu for cpu in ("avx2", "avx512") if FLAGS[cpu] <= cpu_flags()]

NO_KERNEL = AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'")
NO_DISPATCH = NotImplementedError(
    "Could not run '_C::fp8_scaled_mm_cpu' with arguments from the 'CPU' backend. This could be "
    "because the operator doesn't exist for this backend"
)


def chosen(name: str, scheme: str, cpu: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"dtype": "bfloat16", "is_dtype_asked": False} | options
    return choose(name, Checkpoint(scheme, scheme), CPUS[cpu], **settings)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("int4", "plain"), ("int4", "w4a16"), ("auto", "w4a16"), ("awq", "awq"), ("gptq", "gptq")],
)
def test_four_bit_integers_are_refused_without_avx512_in_one_sentence(
    name: str, scheme: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"cannot run here: it needs the kernel cpu_gemm_wna16, which vLLM's library for this "
        r"CPU lacks \(_C_AVX2\.abi3\.so, for AVX2\)\. ",
    ) as caught:
        chosen(name, scheme, "avx2")
    assert "\n" not in str(caught.value)
    for cpu in ("avx512", "avx512_bf16", "amx"):
        chosen(name, scheme, cpu)


def test_a_fallback_is_taken_where_the_library_lacks_the_kernel() -> None:
    found = chosen("int4", "plain", "avx2", fallback=("awq", "int8", "bf16"))
    assert (found.name, found.made_by) == ("int8", "int8")
    assert "int8 is used instead of int4: it needs the kernel cpu_gemm_wna16" in found.warnings[0]
    assert chosen("int4", "plain", "avx512", fallback=("int8",)).name == "int4"


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_a_cache_in_8_bit_floats_is_refused_without_avx512(name: str) -> None:
    with pytest.raises(ConfigError, match="it needs a CPU with avx512f, which this one lacks"):
        choose_kv_cache(name, None, CPUS["avx2"], 64)
    assert choose_kv_cache(name, None, CPUS["avx512"], 64) == name


@pytest.mark.parametrize(
    ("cpu", "names", "kv_caches"),
    [
        ("avx2", "none fp32 fp16 bf16 int8 nf4", ""),
        ("avx512", "none fp32 fp16 bf16 int8 int4 awq gptq nf4", "fp8 fp8_e5m2"),
        ("avx512_bf16", "none fp32 fp16 bf16 int8 int4 awq gptq nf4", "fp8 fp8_e5m2"),
        ("amx", "none fp32 fp16 bf16 int8 int4 fp8 awq gptq nf4", "fp8 fp8_e5m2"),
    ],
)
def test_doctor_says_what_runs_on_each_kind_of_cpu(
    cpu: str, names: str, kv_caches: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for show, expected in ((show_quantizations, names), (show_kv_caches, kv_caches)):
        show(CPUS[cpu])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert " ".join(name for mark, name, *_ in lines if mark == "ok") == expected


@pytest.mark.parametrize("error", [NO_KERNEL, NO_DISPATCH])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: RuntimeError(f"Worker failed: {e}")])
def test_a_kernel_that_is_missing_in_a_step_never_passes_by_starting_again(
    error: Exception, wrap: Any
) -> None:
    from batchinfer.engine.vllm_errors import step_error

    found = step_error(wrap(error), is_worker_dead=True)
    assert isinstance(found, ConfigError)
    kernel = "cpu_gemm_wna16" if error is NO_KERNEL else "_C::fp8_scaled_mm_cpu"
    assert f"it needs vLLM's kernel {kernel}, and " in str(found)
    assert isinstance(step_error(RuntimeError("no"), is_worker_dead=False), EngineDied)


def test_a_file_that_is_no_library_says_nothing_of_kernels(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", b"\0" * 5000):
        (tmp_path / "a.so").write_bytes(content)
        assert registered_operators(tmp_path / "a.so") is None
    assert registered_operators(tmp_path / "none.so") is None


# The real vLLM.

PROBE = """
import json, torch
import vllm._custom_ops
from batchinfer.engine.cpu_library import cpu_library, loaded_cpu_library
from batchinfer.engine.hardware import cpu_flags

names = [name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
         if name.startswith("_C::")]
expected = cpu_library(cpu_flags())
print(json.dumps([expected.file, sorted(expected.kernels), loaded_cpu_library(),
                  sorted(set(names)), torch.backends.cpu.get_cpu_capability()]))
"""


@pytest.mark.real_engine
@pytest.mark.parametrize("cpu", [None, *HERE])
def test_the_library_and_the_kernels_that_were_read_are_those_that_vllm_loads(
    cpu: str | None,
) -> None:
    environ = os.environ | (environment(cpu) if cpu else {"PYTHONPATH": str(ROOT)})
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environ, capture_output=True, text=True, check=True
    )
    file, kernels, loaded, registered, capability = json.loads(done.stdout.splitlines()[-1])
    assert (file, kernels) == (loaded, registered)
    if cpu is not None:
        library = LIBRARIES[cpu]
        assert loaded == library.file
        assert capability == cpu.upper()
        asked = frozenset().union(*(lib.kernels or () for lib in LIBRARIES.values()))
        assert asked & frozenset(kernels) == library.kernels


def test_each_kind_of_cpu_has_the_library_that_vllm_would_load() -> None:
    found = {cpu: cpu_library(flags) for cpu, flags in FLAGS.items()}
    if None in found.values():
        pytest.skip("vLLM's CPU build is not installed")
    for cpu, library in found.items():
        assert library is not None
        assert (library.file, library.instructions) == (
            LIBRARIES[cpu].file,
            LIBRARIES[cpu].instructions,
        )


def test_a_library_that_was_not_expected_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from batchinfer.engine import vllm_setup

    class Platform:
        def is_cpu(self) -> bool:
            return True

        def import_kernels(self) -> None:
            pass

    monkeypatch.setattr(vllm_setup, "usable_platform", Platform)
    monkeypatch.setattr(vllm_setup, "this_machine", lambda: CPUS["avx512_bf16"])
    monkeypatch.setattr(vllm_setup, "loaded_cpu_library", lambda: "_C_AVX2.abi3.so")
    with caplog.at_level(logging.WARNING):
        assert vllm_setup.check_library() == "_C_AVX2.abi3.so"
    assert "vLLM loaded _C_AVX2.abi3.so for this CPU and not _C.abi3.so" in caplog.text
