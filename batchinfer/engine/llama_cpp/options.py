"""A job's settings as far as llama.cpp cannot follow them, and its options.

Must not know: how they are used, the library.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from batchinfer.config import Job
from batchinfer.errors import ConfigError

#: Option -> (least, most). None of them decides results, beyond rounding.
OPTIONS: Mapping[str, tuple[int, int]] = {"n_threads": (1, 512)}
#: Of llama.cpp: LLAMA_MAX_SEQ.
MAX_SEQS = 256


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option that there is not, or a value that it does not take."""
    for name, value in options.items():
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f": did you mean {close[0]}?" if close else f", it has {', '.join(OPTIONS)}"
            raise ConfigError(
                f"engine.options.{name} is not an option of the engine llama_cpp{hint}"
            )
        least, most = OPTIONS[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(
                f"engine.options.{name}: must be a whole number from {least} to {most}, got "
                f"{value!r}"
            )


def check_settings(job: Job) -> None:
    """Raise ConfigError for settings that mean nothing to llama.cpp: each would be ignored."""
    model, engine = job.model, job.engine
    if model.dtype != "auto":
        raise ConfigError(
            f"model.dtype: {model.dtype}: llama.cpp computes a GGUF file in the types that it is "
            "stored in: leave the key out, or give a file of another type"
        )
    for key, is_given in (("lora", model.lora is not None), ("adapters", bool(model.adapters))):
        if is_given:
            raise ConfigError(
                f"model.{key}: the engine llama_cpp loads no adapters in this version: merge one "
                "into the model before that is made GGUF, or leave the key out"
            )
    for key, is_set in (
        ("model.save_mode", model.save_mode),
        ("model.cpu_offload_gib", model.cpu_offload_gib > 0),
        ("model.tensor_parallel_size", model.tensor_parallel_size > 1),
        ("model.pipeline_parallel_size", model.pipeline_parallel_size > 1),
        ("engine.gpu_memory_utilization", engine.gpu_memory_utilization != "auto"),
    ):
        if is_set:
            raise ConfigError(f"{key} is for GPUs, and llama_cpp runs on the CPU: leave it out")
    if engine.tune:
        raise ConfigError(
            "engine.tune needs an engine that tells what its steps compute, and llama_cpp does "
            "not: leave the key out, and set engine.max_num_seqs by hand"
        )
    if isinstance(engine.max_num_seqs, int) and engine.max_num_seqs > MAX_SEQS:
        raise ConfigError(
            f"engine.max_num_seqs: llama.cpp runs up to {MAX_SEQS} sequences at a time, got "
            f"{engine.max_num_seqs}"
        )
