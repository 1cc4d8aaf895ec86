"""CPUs without AVX-512, or without its bfloat16: which kernels vLLM has there, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cli.doctor import show_dtype, show_kv_caches, show_quantizations
from batchinfer.config import SamplingSettings
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.vllm.cpu_library import cpu_library, registered_operators
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError, EngineDied
from batchinfer.native import cpu_flags
from batchinfer.quantization import (
    SCHEMES,
    TABLE,
    Begun,
    Checkpoint,
    Choice,
    Machine,
    auto_dtype,
    choose,
    choose_kv_cache,
    record_of,
)
from batchinfer.runner.begun import differs_by_machine
from tests.support.cpus import CPUS, FLAGS, LIBRARIES, PACKAGES, environment
from tests.support.jobs import MODEL, ROOT, Ended, Place, job, results, rows, run, write_job
from tests.support.models import read_model
from tests.support.run_many import engine_facts, run_many

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
        ("avx2", "none fp32 fp16 bf16 int8 nf4 qtip exl3", ""),
        ("avx512", "none fp32 fp16 bf16 int8 int4 awq gptq nf4 qtip exl3", "fp8 fp8_e5m2"),
        ("avx512_bf16", "none fp32 fp16 bf16 int8 int4 awq gptq nf4 qtip exl3", "fp8 fp8_e5m2"),
        ("amx", "none fp32 fp16 bf16 int8 int4 fp8 awq gptq nf4 qtip exl3", "fp8 fp8_e5m2"),
    ],
)
def test_doctor_says_what_runs_on_each_kind_of_cpu(
    cpu: str, names: str, kv_caches: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for show, expected in ((show_quantizations, names), (show_kv_caches, kv_caches)):
        show(CPUS[cpu])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert " ".join(name for mark, name, *_ in lines if mark == "ok") == expected


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        (
            "avx2",
            "auto takes float32 for models in bfloat16 and float16 and float32; this CPU has ",
        ),
        ("avx512_bf16", "auto takes bfloat16 for models in bfloat16 and float32, float32 for mod"),
        ("amx", "for models in bfloat16 and float32, float16 for models in float16\n"),
    ],
)
def test_doctor_says_which_dtype_auto_takes_and_why(
    cpu: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_dtype(CPUS[cpu])
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("error", [NO_KERNEL, NO_DISPATCH])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: RuntimeError(f"Worker failed: {e}")])
def test_a_kernel_that_is_missing_in_a_step_never_passes_by_starting_again(
    error: Exception, wrap: Any
) -> None:
    from batchinfer.engine.vllm.errors import step_error

    demand = CompletionDemand("generate", SamplingSettings(max_tokens=1))
    model = VllmSettings("m", "m", "bfloat16", 256, 1, 1, demand)

    def in_a_step(error: Exception) -> Exception:
        return step_error(error, model, (8, 512), is_worker_dead=False, is_killed=False)

    found = in_a_step(wrap(error))
    assert isinstance(found, ConfigError)
    kernel = "cpu_gemm_wna16" if error is NO_KERNEL else "_C::fp8_scaled_mm_cpu"
    assert f"it needs vLLM's kernel {kernel}, and " in str(found)
    assert isinstance(in_a_step(RuntimeError("no")), EngineDied)


def test_a_file_that_is_not_a_library_says_nothing_of_kernels(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", b"\0" * 5000):
        (tmp_path / "a.so").write_bytes(content)
        assert registered_operators(tmp_path / "a.so") is None
    assert registered_operators(tmp_path / "none.so") is None


@pytest.mark.parametrize(
    ("own", "cpu", "taken"),
    [
        ("bfloat16", "avx2", "float32"),
        ("bfloat16", "avx512", "float32"),
        ("bfloat16", "avx512_bf16", "bfloat16"),
        ("bfloat16", "amx", "bfloat16"),
        ("float16", "avx2", "float32"),
        ("float16", "avx512_bf16", "float32"),
        ("float16", "amx", "float16"),
        ("float32", "avx2", "float32"),
        ("float32", "avx512_bf16", "bfloat16"),
    ],
)
def test_auto_takes_the_checkpoints_dtype_only_where_the_cpu_computes_in_it(
    own: str, cpu: str, taken: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": own, "torch_dtype": own}))
    facts = read_model(str(folder), machine=CPUS[cpu])
    assert facts.dtype == taken
    assert any(f"auto computes in {taken}" in note for note in facts.notes) == (own != taken)
    for asked in ("bfloat16", "float16", "float32"):
        assert read_model(str(folder), machine=CPUS[cpu], dtype=asked).dtype == asked
    assert read_model(str(folder), machine=CPUS[cpu], quantization="int8").dtype in (
        taken,
        "bfloat16",  # int8 is not computed in float16
    )


H200 = Machine("cuda", compute_capability=(9, 0), packages=PACKAGES, engine="vllm")
T4 = Machine("cuda", compute_capability=(7, 5), packages=PACKAGES, engine="vllm")


@pytest.mark.parametrize(
    ("own", "name", "scheme", "dtype"),
    [
        ("float16", "awq", "awq", "float16"),  # not computed in float32: as the checkpoint says
        ("bfloat16", "int4", "plain", "bfloat16"),
        ("float16", "int8", "plain", "float32"),
        ("bfloat16", "nf4", "bnb-4bit", "float32"),
    ],
)
def test_a_quantization_that_float32_does_not_compute_keeps_the_checkpoints_dtype(
    own: str, name: str, scheme: str, dtype: str
) -> None:
    machine = CPUS["avx512"]
    checkpoint = Checkpoint(scheme, "", dtype=own)
    auto = auto_dtype(own, machine)[0]
    found = choose(name, checkpoint, machine, dtype=auto, is_dtype_asked=False)
    assert found.dtype == dtype


MACHINES = (*CPUS.values(), H200, T4, Machine(None, engine="vllm"))
NAMES = tuple(record.name for record in TABLE)


@settings(max_examples=600, deadline=None)
@given(
    asked=st.sampled_from(("auto", *NAMES)),
    fallback=st.lists(st.sampled_from(NAMES), max_size=3),
    scheme=st.sampled_from((*SCHEMES, "torchao")),
    asked_dtype=st.sampled_from((None, "bfloat16", "float16", "float32")),
    own=st.sampled_from(("bfloat16", "float16", "float32")),
    one=st.sampled_from(MACHINES),
    other=st.sampled_from(MACHINES),
)
def test_what_an_output_was_begun_in_is_kept_on_every_machine_or_refused(
    asked: str,
    fallback: list[str],
    scheme: str,
    asked_dtype: str | None,
    own: str,
    one: Machine,
    other: Machine,
) -> None:
    def chosen_on(machine: Machine, begun: Begun | None) -> Choice | None:
        try:
            return choose(
                asked,
                Checkpoint(scheme, scheme),
                machine,
                dtype=asked_dtype or auto_dtype(own, machine)[0],
                is_dtype_asked=asked_dtype is not None,
                fallback=fallback,
                begun=begun,
            )
        except ConfigError:
            return None

    if asked != "auto":  # a name that is a dtype asks for it
        asked_dtype = record_of(asked).dtype or asked_dtype
    first = chosen_on(one, None)
    if first is None:
        return
    begun = Begun(first.dtype, first.name)
    again, elsewhere = chosen_on(one, begun), chosen_on(other, begun)
    assert again is not None and Begun(again.dtype, again.name) == begun
    assert elsewhere is None or Begun(elsewhere.dtype, elsewhere.name) == begun


# Runs on the fake engine: dtype and quantization of an output are decided before one is built.


def on(cpu: str, path: Path, *arguments: str, **options: Any) -> Ended:
    return run(path, *arguments, environ=environment(cpu), **options)


def computed_in(place: Place, output: str = "out") -> set[tuple[str, str]]:
    """(dtype, quantization) of everything finished."""
    found = set()
    for name in place.names(output):
        if name.endswith((".parquet", ".part")):
            facts = json.loads(pq.read_metadata(place.url(output, name)).metadata[b"batchinfer"])
            found.add((facts["model"]["dtype"], facts["model"]["quantization"]))
    return found


@pytest.fixture
def filled(folder: Place) -> Place:
    for name in ("a", "b"):
        folder.write_parquet(f"in/{name}.parquet", rows(8))
    return folder


def test_an_output_begun_in_bfloat16_stays_so_on_a_cpu_that_is_slow_in_it(
    filled: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(filled))
    assert on("avx512_bf16", path, "--limit", "6").result["status"] == "partial"
    assert computed_in(filled) == {("bfloat16", "none")}
    words = (
        "the output was begun in bfloat16 and stays so; a new output.path would be computed in "
        "float32 here, which is faster: this CPU has no bfloat16 arithmetic (avx512_bf16 or "
        "amx_bf16)"
    )
    for command in ("validate", "plan"):
        looked = on("avx2", path, command=(command,))
        assert looked.code == 0, looked.stderr
        assert f"warning  {words}" in looked.stdout
    ended = on("avx2", path)
    assert (ended.code, computed_in(filled)) == (0, {("bfloat16", "none")})
    assert ended.result["warnings"] == [words]
    assert on("avx512", path).result["status"] == "complete"
    refused = on("avx2", path, "--set", "model.dtype=float32")
    assert refused.code == 2
    assert 'model.dtype: was "bfloat16", is "float32"' in refused.result["message"]
    again = on("avx2", path, "--restart")
    assert (again.code, computed_in(filled)) == (0, {("float32", "none")})
    assert again.result["warnings"] == []


def test_slices_on_different_cpus_compute_in_one_dtype(filled: Place, tmp_path: Path) -> None:
    path = write_job(tmp_path, job(filled))
    for index, cpu in ((1, "avx2"), (2, "avx512_bf16")):
        ended = on(cpu, path, "--shard", f"{index}/2")
        assert ended.code == 0, ended.stderr
    assert computed_in(filled) == {("float32", "none")}
    assert "begun in float32 and stays so" in ended.stderr


def test_an_output_without_results_takes_what_is_fast_where_the_next_start_is(
    filled: Place, tmp_path: Path
) -> None:
    for output, arguments, dtype in (
        ("whole", (), "float32"),
        ("sliced", ("--shard", "1/2"), "bfloat16"),  # another slice may be at work
    ):
        path = write_job(tmp_path, job(filled, output), f"{output}.yaml")
        assert on("avx512_bf16", path, *arguments, fake={"fail_build": "no"}).code == 2
        ended = on("avx2", path, *arguments)
        assert ended.code == 0, ended.stderr
        assert computed_in(filled, output) == {(dtype, "none")}


def test_a_fallback_that_an_output_was_begun_with_is_kept_where_the_first_name_runs(
    filled: Place, tmp_path: Path
) -> None:
    model = {"path": str(MODEL), "quantization": "int4", "quantization_fallback": ["int8"]}
    path = write_job(tmp_path, job(filled, model=model))
    begun = on("avx2", path, "--limit", "6")
    assert "int8 is used instead of int4: it needs the kernel" in begun.result["warnings"][0]
    ended = on("avx512_bf16", path)
    assert (ended.code, computed_in(filled)) == (0, {("float32", "int8")})
    assert "int8 is used instead of int4: the output was begun with it" in ended.stderr


def test_an_output_that_a_cpu_cannot_continue_is_refused_there_with_the_reason(
    filled: Place, tmp_path: Path
) -> None:
    model = {"path": str(MODEL), "quantization": "int4", "quantization_fallback": ["int8"]}
    path = write_job(tmp_path, job(filled, model=model))
    assert on("avx512_bf16", path, "--limit", "6").code == 0
    refused = on("avx2", path)
    assert refused.code == 2
    assert (
        "the output was begun in bfloat16 with quantization int4, which cannot run here: it needs "
        "the kernel cpu_gemm_wna16"
    ) in refused.result["message"]
    assert computed_in(filled) == {("bfloat16", "int4")}


def test_two_first_starts_on_different_cpus_are_distinguished_from_two_jobs() -> None:
    of_machine = ['model.dtype: was "bfloat16", is "float32"', 'model.content.made by: was "a", is']
    assert differs_by_machine(of_machine)
    assert not differs_by_machine([*of_machine, 'prompt.column: was "a", is "b"'])


# The real vLLM.

PROBE = """
import json, torch
import vllm._custom_ops
from batchinfer.engine.vllm.cpu_library import cpu_library, loaded_cpu_library
from batchinfer.native import cpu_flags

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
    from batchinfer.engine.vllm import setup as vllm_setup

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


needs_more_than_avx2 = pytest.mark.skipif(
    "avx2" not in HERE, reason="this CPU has AVX2 alone, and cannot be made one"
)


@pytest.mark.real_engine
@needs_more_than_avx2
def test_a_job_and_a_begun_output_run_on_a_cpu_without_avx512(
    filled: Place, tmp_path: Path
) -> None:
    engine = {"options": {"kv_cache_memory_bytes": 1 << 25}}
    paths = {
        name: write_job(
            tmp_path,
            job(filled, name, model={"path": str(MODEL), **model}, engine=engine),
            f"{name}.yaml",
        )
        for name, model in {
            "begun": {},
            "fresh": {},
            "int8": {"quantization": "int4", "quantization_fallback": ["int8"]},
            "int4": {"quantization": "int4"},
        }.items()
    }
    begun = run(paths["begun"], "--limit", "6", engine="real", timeout_s=280)
    assert begun.code == 0, begun.stderr
    [(dtype, _)] = computed_in(filled, "begun")
    environ = {**environment("avx2"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    *ran, (code, refused) = run_many(*paths.values(), environ=environ)
    assert [code for code, _ in ran] == [0, 0, 0], ran
    assert (code, "it needs the kernel cpu_gemm_wna16" in refused["message"]) == (2, True)
    assert computed_in(filled, "begun") == {(dtype, "none")}
    assert computed_in(filled, "fresh") == {("float32", "none")}
    assert computed_in(filled, "int8") == {("float32", "int8")}
    for name in ("begun", "fresh", "int8"):
        assert results(filled, name)["error_type"].null_count() == 16
        of_engine = engine_facts(filled.url(name, "a.parquet"))["dtype"]
        assert of_engine == (dtype if name == "begun" else "float32")


@pytest.mark.real_engine
@needs_more_than_avx2
def test_a_kernel_that_vllm_turns_out_to_lack_is_an_error_of_the_job_that_names_it(
    filled: Place, tmp_path: Path
) -> None:
    from tests.support.checkpoints import write_checkpoint  # imports torch

    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no avx512, which is seen before vLLM is loaded")
    model = write_checkpoint("awq", tmp_path / "awq")
    path = write_job(tmp_path, job(filled, model={"path": str(model)}))
    only_torch = environment("avx2") | {"STAND_IN_ONLY_TO": "torch.cpu"}
    ended = run(path, environ=only_torch, engine="real", timeout_s=280)
    assert ended.code == 2, ended.stderr
    assert "it needs vLLM's kernel cpu_gemm_wna16, and " in ended.result["message"]
    assert "_C_AVX2.abi3.so, lacks it" in ended.result["message"]
    assert any("vLLM loaded _C_AVX2.abi3.so" in text for text in ended.result["warnings"])
