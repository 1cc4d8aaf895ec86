"""Loads a model into llama.cpp: from settings to its structures.

Must not know: what requests ask.
"""

from __future__ import annotations

import logging

from batchinfer.engine.base import EngineFacts, EngineSpec
from batchinfer.engine.llama_cpp.engine import LlamaCppEngine
from batchinfer.engine.llama_cpp.sizes import MAX_UBATCH, Sizes
from batchinfer.errors import ConfigError
from batchinfer.llama_cpp.installation import installed_version
from batchinfer.llama_cpp.library import FLASH_AUTO, FLASH_OFF, GGML_F16, GGML_F32, library
from batchinfer.llama_cpp.vocabulary import Vocabulary, load_error

log = logging.getLogger(__name__)


def build_engine(spec: EngineSpec, sizes: Sizes, num_threads: int) -> LlamaCppEngine:
    """Load the model and check the sampling settings on it.

    Raises ConfigError for what another start cannot fix.
    """
    lib = library()
    vocabulary = Vocabulary(spec.model.path)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(spec.model.path.encode(), params)
    if not model:
        raise ConfigError(f"llama.cpp cannot load {spec.model.path}: {load_error()}")
    context_params = lib.llama_context_default_params()
    context_params.n_ctx = sizes.kv_tokens
    context_params.n_batch = sizes.max_num_batched_tokens
    context_params.n_ubatch = min(sizes.max_num_batched_tokens, MAX_UBATCH)
    context_params.n_seq_max = sizes.max_num_seqs
    context_params.n_outputs_max = sizes.num_outputs
    context_params.n_outputs_max_per_seq = sizes.num_outputs
    context_params.n_threads = context_params.n_threads_batch = num_threads
    is_exact = spec.model.dtype == "float32"
    kv_type = GGML_F32 if is_exact else GGML_F16
    context_params.type_k = context_params.type_v = kv_type
    # Flash attention computes with halves whatever it is given: logprobs off by 0.01, not 1e-5.
    context_params.flash_attn_type = FLASH_OFF if is_exact else FLASH_AUTO
    context_params.kv_unified = sizes.is_shared
    context = lib.llama_init_from_model(model, context_params)
    if not context:
        lib.llama_model_free(model)
        raise ConfigError(f"llama.cpp cannot run {spec.model.path}: {load_error()}")
    facts = _facts(spec, sizes, num_threads)
    log.info("llama.cpp: %s", facts.extra)
    return LlamaCppEngine(spec, sizes, facts, vocabulary, (model, context))


def _facts(spec: EngineSpec, sizes: Sizes, num_threads: int) -> EngineFacts:
    return EngineFacts(
        name="llama_cpp",
        version=str(installed_version()),
        device="cpu",
        dtype=spec.model.dtype,
        quantization=spec.model.quantization,
        max_model_len=spec.model.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        kv_cache_tokens=sizes.kv_tokens,
        extra={
            "n_threads": num_threads,
            "kv_unified": sizes.is_shared,
            "kv_cache_dtype": "float32" if spec.model.dtype == "float32" else "float16",
            "options": dict(spec.job.engine.options),
        },
    )
