"""llama.cpp's C interface (llama.h) by ctypes, as far as it is used here.

xllamacpp's own classes drive llama.cpp's HTTP server: a port opened for each model, a thread for
each sequence, no logprobs of prompts. The library inside it exports the C interface, which has none
of that. Its structures change between versions of llama.cpp, so only known versions are loaded
(`installation`), and the defaults that the library gives are held against those expected.
Must not know: files' contents, what is computed with it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32
from ctypes import c_void_p as pointer
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.imports import import_failure
from batchinfer.llama_cpp.installation import PACKAGE, VERSIONS, installation_fault

log = logging.getLogger(__name__)

GGML_F32, GGML_F16 = 0, 1
FLASH_OFF, FLASH_AUTO = 0, -1
_DETAIL, _WARNING, _ERROR, _CONTINUED = 1, 3, 4, 5
#: How its lines are logged. A detail is of each step's graph: hundreds of lines, and none is.
_LEVELS = {_DETAIL: None, _WARNING: logging.INFO, _ERROR: logging.INFO}
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, pointer)


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class ModelParams(ctypes.Structure):
    _fields_ = [
        *_fields(pointer, "devices tensor_buft_overrides"),
        ("n_gpu_layers", c_int32),
        *_fields(c_int, "split_mode load_mode lazy_mode"),
        ("main_gpu", c_int32),
        *_fields(pointer, "tensor_split progress_callback progress_user_data kv_overrides"),
        *_fields(c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    ]


class ContextParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max"),
        ("n_outputs_max_per_seq", c_uint32),
        *_fields(c_int32, "n_threads n_threads_batch"),
        *_fields(c_int, "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        *_fields(c_float, "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor"),
        *_fields(c_float, "yarn_beta_fast yarn_beta_slow"),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *_fields(pointer, "cb_eval cb_eval_user_data"),
        *_fields(c_int, "type_k type_v"),
        *_fields(pointer, "callback_1 callback_2 callback_3"),
        *_fields(c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        ("samplers", pointer),
        ("n_samplers", c_size_t),
        ("ctx_other", pointer),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        *_fields(pointer, "token embd pos n_seq_id seq_id logits"),
    ]


class SamplerChainParams(ctypes.Structure):
    _fields_ = [("no_perf", c_bool)]


#: Function -> what it returns, what it takes.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG_CALLBACK, pointer)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (pointer, (c_char_p, ModelParams)),
    "llama_model_free": (None, (pointer,)),
    "llama_model_get_vocab": (pointer, (pointer,)),
    "llama_init_from_model": (pointer, (pointer, ContextParams)),
    "llama_free": (None, (pointer,)),
    "llama_get_memory": (pointer, (pointer,)),
    "llama_memory_seq_rm": (c_bool, (pointer, c_int32, c_int32, c_int32)),
    "llama_n_ctx": (c_uint32, (pointer,)),
    "llama_n_ctx_seq": (c_uint32, (pointer,)),
    "llama_decode": (c_int32, (pointer, Batch)),
    "llama_get_logits": (POINTER(c_float), (pointer,)),
    "llama_vocab_n_tokens": (c_int32, (pointer,)),
    "llama_vocab_bos": (c_int32, (pointer,)),
    "llama_vocab_eos": (c_int32, (pointer,)),
    "llama_vocab_get_add_bos": (c_bool, (pointer,)),
    "llama_vocab_get_add_eos": (c_bool, (pointer,)),
    "llama_vocab_is_eog": (c_bool, (pointer, c_int32)),
    "llama_vocab_is_control": (c_bool, (pointer, c_int32)),
    "llama_vocab_get_text": (c_char_p, (pointer, c_int32)),
    "llama_tokenize": (
        c_int32,
        (pointer, c_char_p, c_int32, pointer, c_int32, c_bool, c_bool),
    ),
    "llama_token_to_piece": (
        c_int32,
        (pointer, c_int32, c_char_p, c_int32, c_int32, c_bool),
    ),
    "llama_sampler_chain_init": (pointer, (SamplerChainParams,)),
    "llama_sampler_chain_add": (None, (pointer, pointer)),
    "llama_sampler_init_penalties": (pointer, (c_int32, c_int32, c_float, c_float, c_float)),
    "llama_sampler_init_temp": (pointer, (c_float,)),
    "llama_sampler_init_min_p": (pointer, (c_float, c_size_t)),
    "llama_sampler_init_top_k": (pointer, (c_int32,)),
    "llama_sampler_init_top_p": (pointer, (c_float, c_size_t)),
    "llama_sampler_init_dist": (pointer, (c_uint32,)),
    "llama_sampler_init_greedy": (pointer, ()),
    "llama_sampler_init_grammar": (pointer, (pointer, c_char_p, c_char_p)),
    "llama_sampler_sample": (c_int32, (pointer, pointer, c_int32)),
    "llama_sampler_accept": (None, (pointer, c_int32)),
    "llama_sampler_clone": (pointer, (pointer,)),
    "llama_sampler_free": (None, (pointer,)),
}
_EXPECTED_MODEL = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "use_extra_bufts": True}
_EXPECTED_CONTEXT = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1,
    "flash_attn_type": -1, "yarn_ext_factor": -1.0, "type_k": GGML_F16, "type_v": GGML_F16,
    "offload_kqv": True, "no_perf": True, "kv_unified": False,
}  # fmt: skip


@cache
def library() -> Any:
    """The loaded library, its functions by their names. Raises ConfigError."""
    if fault := installation_fault():
        raise ConfigError(fault)
    # Threads that spin at barriers cost several times as much as soon as the cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # before it ends the process it starts gdb
    try:
        # Its classes are not needed: without them a start is 0.02 s shorter, and so is each probe.
        package = find_spec(PACKAGE)
        assert package is not None and package.origin is not None, "installation_fault has seen it"
        loaded = ctypes.CDLL(str(Path(package.origin).with_name("xllamacpp.abi3.so")))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except Exception as error:  # a system library that is not there; another build of the package
        raise import_failure(PACKAGE, error) from error
    _check_defaults(loaded.llama_model_default_params(), _EXPECTED_MODEL)
    _check_defaults(loaded.llama_context_default_params(), _EXPECTED_CONTEXT)
    loaded.llama_log_set(_log, None)
    loaded.llama_backend_init()
    return loaded


def _check_defaults(params: ctypes.Structure, expected: Mapping[str, object]) -> None:
    found = {name: getattr(params, name) for name in expected}
    if found != expected:
        raise ConfigError(
            f"{PACKAGE} holds another llama.cpp than the release of that version: reinstall "
            f"{PACKAGE}=={VERSIONS[-1]}"
        )


def _logging() -> Callable[..., None]:
    """llama.cpp's lines -> ours: warnings and errors as such, the rest for --debug alone."""
    pending: list[str] = []
    level: list[int | None] = [None]

    def write(number: int, text: bytes | None, _: Any) -> None:
        if number != _CONTINUED:
            level[0] = _LEVELS.get(number, logging.DEBUG)
        if level[0] is None:
            return
        pending.append((text or b"").decode("utf-8", "replace"))
        if pending[-1].endswith("\n"):
            line = "".join(pending).strip()
            pending.clear()
            if number == _ERROR and line:
                last_errors.append(line)
                del last_errors[:-_MAX_ERRORS]
            if line:
                log.log(level[0], "llama.cpp: %s", line)

    return write


_MAX_ERRORS = 20
#: The library's last words of what it could not do.
last_errors: list[str] = []
_log = _LOG_CALLBACK(_logging())  # the library calls it for as long as the process lives
