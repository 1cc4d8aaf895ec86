"""How model facts, prompter and engine come from a job.

The only place that joins job, model folder and an engine's settings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from batchinfer.config import Job, thaw
from batchinfer.engine.base import Engine, EngineSettings
from batchinfer.engine.crowd import look_at_devices
from batchinfer.engine.fit import check_offload
from batchinfer.engine.hardware import this_machine
from batchinfer.engine.vllm.compiler import check_compiler
from batchinfer.engine.vllm.options import check_options
from batchinfer.engine.vllm.phases import told_phases
from batchinfer.model import ModelFacts, read_model
from batchinfer.model.weights import read_weights
from batchinfer.prompt import Prompter
from batchinfer.quantization import Begun
from batchinfer.tasks import task_of


@dataclass(frozen=True, slots=True)
class EngineFactory:
    """`prepare` sets the process up before torch is first imported; `build` loads the model.

    `load` imports what `build` needs: it may run beforehand, in a thread of its own. `phases`
    tells, while `build` runs, what takes its time.
    """

    prepare: Callable[[Job, ModelFacts], None]
    build: Callable[[Job, ModelFacts], Engine]
    load: Callable[[], None] = lambda: None
    phases: Callable[[Callable[[str], None]], AbstractContextManager[None]] = lambda tell: (
        nullcontext()
    )


def vllm_factory() -> EngineFactory:
    return EngineFactory(prepare=_prepare, build=_build, load=_load, phases=told_phases)


def _prepare(job: Job, model: ModelFacts) -> None:
    """Set the environment; and look at the devices before half a minute of imports."""
    from batchinfer.engine.vllm.installation import check_installation, check_variables
    from batchinfer.engine.vllm.setup import prepare_environment
    from batchinfer.engine.vllm.sizes import expected_sizes

    check_installation()
    check_variables()
    prepare_environment(weights_bytes=model.weights_bytes, is_local_model=True)
    settings = engine_settings(job, model)
    look_at_devices(settings, expected_sizes(settings))


def _load() -> None:
    from batchinfer.engine.vllm.engine import import_engine

    import_engine()


def _build(job: Job, model: ModelFacts) -> Engine:
    from batchinfer.engine.vllm.engine import build_vllm_engine

    return build_vllm_engine(engine_settings(job, _with_checkpoint(model)))


def _with_checkpoint(model: ModelFacts) -> ModelFacts:
    """The facts with the folder to load: the model's own, or what is made of it once."""
    if model.made_by is None:
        return model
    from batchinfer.making.cached import cached_checkpoint

    folder = cached_checkpoint(model)
    return replace(model, path=str(folder), weights_bytes=read_weights(folder).size_bytes)


def model_of(job: Job, begun: Begun | None = None) -> ModelFacts:
    """Facts of the job's model folder. `begun`: see `read_model`. Raises ConfigError."""
    check_options(job.engine.options, task_of(job).sampling)
    check_compiler(job.engine.options, this_machine())
    check_offload(job.model.save_mode, job.model.cpu_offload_gib, this_machine())
    return read_model(
        job.model.path,
        tokenizer=job.model.tokenizer,
        revision=job.model.revision,
        dtype=job.model.resolved_dtype,
        quantization=job.model.quantization,
        quantization_fallback=job.model.quantization_fallback,
        kv_cache_dtype=job.model.kv_cache_dtype,
        lora=job.model.lora,
        machine=this_machine(),
        max_model_len=job.model.max_model_len,
        needs_weights=job.engine.options.get("load_format") != "dummy",
        begun=begun,
    )


def prompter_of(job: Job, model: ModelFacts) -> Prompter:
    """The job's prompter; loads the tokenizer. Raises ConfigError."""
    return Prompter(
        job.prompt,
        model.tokenizer_path,
        max_model_len=model.max_model_len,
        max_tokens=job.sampling.max_tokens,
        vocab_size=model.vocab_size,
        trust_remote_code=job.model.trust_remote_code,
    )


def engine_settings(job: Job, model: ModelFacts) -> EngineSettings:
    """The plain settings an engine takes."""
    return EngineSettings(
        model_path=model.path,
        tokenizer_path=model.tokenizer_path,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        weights_bytes=model.weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        sampling=task_of(job).sampling,
        tensor_parallel_size=job.model.tensor_parallel_size,
        trust_remote_code=job.model.trust_remote_code,
        quantization=model.engine_quantization,
        is_quantized=model.quantization != "none",
        kv_cache_dtype=job.model.kv_cache_dtype,
        lora=model.lora,
        has_save_mode=job.model.save_mode,
        save_mode_gib=job.model.save_mode_gib,
        cpu_offload_gib=job.model.cpu_offload_gib,
        max_num_seqs=_size(job.engine.max_num_seqs),
        max_num_batched_tokens=_size(job.engine.max_num_batched_tokens),
        gpu_memory_utilization=_share(job.engine.gpu_memory_utilization),
        needs=model.needs,
        options=thaw(job.engine.options),
    )


def _share(value: float | str) -> float | None:
    """`auto` is what other processes leave."""
    return None if isinstance(value, str) else value


def _size(value: int | str | None) -> int | None:
    """`auto` is the engine's to choose."""
    return value if isinstance(value, int) else None
