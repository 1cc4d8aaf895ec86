"""`doctor`: what works on this machine, a line each, and for what does not the one thing that is
missing.
"""

from __future__ import annotations

import platform
import sys
import uuid

import click

from batchinfer import __version__
from batchinfer.cli.common import look_at, never
from batchinfer.cli.versions import package_versions
from batchinfer.config import DEFAULT_ENGINE, load_job
from batchinfer.engine.base import EngineKind
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import BatchInferError, ConfigError
from batchinfer.making.cached import describe_cache
from batchinfer.quantization import (
    KV_CACHE_TABLE,
    TABLE,
    Machine,
    describe_auto_dtype,
    for_this_machine,
    kv_cache_why_not,
    support_of,
)
from batchinfer.runner.start import list_input, open_output
from batchinfer.storage import Store, open_store
from batchinfer.storage.probe import problem_of


def examine(job_path: str | None, url: str | None) -> None:
    """Raises ConfigError at the end if something that was asked about does not work."""
    _packages()
    kind = engine_kind(_engine_name(job_path))
    problems = [_engine(kind), *([_store(url, open_store(url))] if url is not None else [])]
    show_dtype(kind.machine())
    show_quantizations(kind.machine())
    show_made_checkpoints()
    show_kv_caches(kind.machine())
    if job_path is not None:
        problems += _job(job_path)
    failed = [problem for problem in problems if problem]
    if failed:
        raise ConfigError(f"{len(failed)} of the checks above failed")


def _line(what: str, text: str, *, ok: bool = True, mark: str | None = None) -> None:
    click.echo(f"{mark or ('ok' if ok else 'MISSING'):<7}  {what:<9} {text}")


def _packages() -> None:
    python = f"Python {platform.python_version()}"
    _line("batchinfer", f"{__version__}, {python}", ok=sys.version_info[:2] in ((3, 11), (3, 12)))
    _line("packages", package_versions())


def _engine_name(job_path: str | None) -> str:
    try:
        return load_job(job_path).job.engine.name if job_path is not None else DEFAULT_ENGINE
    except ConfigError:  # raised again once the rest was looked at
        return DEFAULT_ENGINE


def _engine(kind: EngineKind) -> str | None:
    problem = None
    for finding in kind.examine():
        _line(finding.subject, finding.text, mark=finding.mark)
        problem = "engine" if finding.is_failure else problem
    return problem


def show_dtype(machine: Machine) -> None:
    """What `model.dtype: auto` takes here."""
    if machine.device is not None:
        _line("dtype", f"model.dtype: {describe_auto_dtype(machine)}")


def show_quantizations(machine: Machine) -> None:
    """A line for each name of `model.quantization`. Unsupported names do not fail the check."""
    if machine.device is None:
        title = support_of(machine).title
        _line("names", f"of model.quantization: unknown without {title} and a device", mark="-")
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
    try:
        problem = problem_of(store, f"_batchinfer/leases/doctor-{uuid.uuid4().hex[:8]}")
    except BatchInferError as error:
        problem = str(error)
    if problem is not None:
        _line("store", f"{what}: {problem}", ok=False)
        return "store"
    _line("store", f"{what}: write, read, list, delete and conditional create work")
    return None


def _job(path: str) -> list[str | None]:
    problems: list[str | None] = []
    job = load_job(path).job
    try:
        looked = look_at(job, path)
        _line("job", f"{path}: {len(looked.shards)} shards, model {looked.model.path}")
        for line in looked.start.kind.describe_memory(looked.start.spec):
            _line("memory", line, mark="no" if line.startswith("does not fit") else "ok")
    except BatchInferError as error:
        _line("job", f"{path}: {error}", ok=False)
        problems.append("job")
    problems.append(_store(job.output.path, open_output(job, never)))
    try:
        list_input(job.input, never)
    except BatchInferError as error:
        _line("input", str(error), ok=False)
        problems.append("input")
    return problems
