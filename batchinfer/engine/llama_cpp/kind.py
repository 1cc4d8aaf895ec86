"""llama.cpp as an engine that a job names.

Must not know: runs, outputs. Light to import: the library is loaded by `load` and `build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from batchinfer.config import Job
from batchinfer.engine.base import (
    Demand,
    Engine,
    EngineKind,
    EngineSpec,
    Finding,
    Placement,
    Serving,
)
from batchinfer.engine.hardware import gib
from batchinfer.engine.host import available_memory_bytes, total_memory_bytes
from batchinfer.engine.kinds import demands_in
from batchinfer.engine.llama_cpp import demands
from batchinfer.engine.llama_cpp.options import check_options, check_settings
from batchinfer.engine.llama_cpp.requests import requests_of
from batchinfer.engine.llama_cpp.sizes import num_threads, shortage, sizes_of
from batchinfer.engine.placing import on_cores
from batchinfer.errors import ConfigError, MemoryHeld
from batchinfer.llama_cpp.installation import (
    PACKAGE,
    installation_fault,
    installed_version,
)
from batchinfer.native import cpu_flags
from batchinfer.quantization import Machine


class LlamaCppKind:
    """See `EngineKind` for the contract."""

    wants = demands_in(demands)

    def machine(self) -> Machine:
        device = "cpu" if installation_fault() is None else None
        return Machine(device, cpu_flags=cpu_flags(), engine="llama_cpp")  # type: ignore[arg-type]

    def packages(self) -> Iterable[str]:
        return (PACKAGE,)

    def check(self, job: Job, demand: Demand) -> None:
        check_options(job.engine.options)
        check_settings(job)
        requests_of(demand).check()
        if job.executor == "local":
            self.placements(job)
        if fault := installation_fault():
            raise ConfigError(fault)

    def deciding_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def needs_weights(self, job: Job) -> bool:
        return True

    def placements(self, job: Job) -> Sequence[Placement]:
        return on_cores(job.engine.devices)

    def num_gpus(self, job: Job) -> int:
        return 0

    def check_fit(self, spec: EngineSpec) -> None:
        if lacks := shortage(spec, total_memory_bytes()):
            raise ConfigError(f"{spec.model.path} does not fit this machine: {lacks}")

    def describe_memory(self, spec: EngineSpec) -> list[str]:
        sizes, length = sizes_of(spec), spec.model.max_model_len
        whose = "that they share" if sizes.is_shared else f"of {length:,} tokens each"
        lines = [
            f"about {gib(sizes.weights_bytes)} of weights ({spec.model.quantization}), "
            f"{gib(sizes.step_bytes)} for a step of {sizes.max_num_batched_tokens:,} tokens, "
            f"{gib(sizes.kv_bytes)} of KV cache for {sizes.max_num_seqs:,} sequences {whose}"
        ]
        if lacks := shortage(spec):
            return [*lines, f"does not fit: {lacks}"]
        return [
            *lines,
            f"{gib(available_memory_bytes())} of {gib(total_memory_bytes())} are free: room for "
            f"{sizes.kv_tokens:,} tokens, {sizes.kv_tokens // length:,} sequences of {length:,}",
        ]

    def examine(self) -> Iterable[Finding]:
        if fault := installation_fault():
            yield Finding("engine", fault, "MISSING", is_failure=True)
            return
        try:
            from batchinfer.llama_cpp.library import library

            library()
        except ConfigError as error:
            yield Finding("engine", str(error), "MISSING", is_failure=True)
            return
        yield Finding("engine", f"llama.cpp of {PACKAGE} {installed_version()}")
        yield Finding("device", f"cpu, {gib(available_memory_bytes())} of memory free")

    def prepare(self, spec: EngineSpec) -> None:
        self.check_fit(spec)
        if lacks := shortage(spec):
            raise MemoryHeld(f"{spec.model.path} does not fit beside what runs here now: {lacks}")

    def load(self) -> None:
        from batchinfer.llama_cpp.library import library

        library()

    def phases(self, report: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def build(self, spec: EngineSpec) -> Engine:
        from batchinfer.engine.llama_cpp.build import build_engine

        return build_engine(spec, sizes_of(spec), num_threads(spec))

    def serve(self, spec: EngineSpec, serving: Serving) -> int:
        from batchinfer.engine.llama_cpp.server import serve_llama_cpp

        return serve_llama_cpp(spec, serving)


KIND: EngineKind = LlamaCppKind()
