"""llama.cpp's own HTTP server, in this process: at a port of this machine that it chooses itself.

xllamacpp's class starts it and has no way to end it but the end of the process. Must not know:
jobs, who asks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from batchinfer.errors import ConfigError
from batchinfer.imports import import_failure
from batchinfer.llama_cpp.installation import PACKAGE, installation_fault

_MAX_HTTP_THREADS = 1024  # each request holds one while it is answered, or waits


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the server is started with."""

    file: str
    name: str  # by which clients ask for the model
    num_seqs: int  # that run at a time
    kv_tokens: int  # of all of them together
    is_shared: bool  # or each has its part of them
    num_batched_tokens: int
    num_ubatch: int
    num_threads: int
    is_exact: bool  # float32 in the KV cache, and attention that does not round to halves
    chat_template: str | None  # its text; None: the file's own
    template_kwargs: Mapping[str, str]  # each as JSON
    sampling: Mapping[str, Any]  # what a request gets that does not say, by llama.cpp's names
    max_tokens: int  # the same


@dataclass(frozen=True, slots=True)
class HttpServer:
    """Where it listens. `api_key`: without it only /health is answered."""

    host: str
    port: int
    api_key: str = field(repr=False)
    #: It lives as long as this.
    server: Any = field(repr=False)


def start_server(settings: ServerSettings) -> HttpServer:
    """Load the model and listen. Raises ConfigError."""
    if fault := installation_fault():
        raise ConfigError(fault)
    # As in `library`: before the first thread is there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        import xllamacpp
    except Exception as error:  # a system library that is not there
        raise import_failure(PACKAGE, error) from error
    api_key = secrets.token_urlsafe(24)
    params = _params(xllamacpp, settings)
    params.api_keys = [api_key]
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # its classes are not public; its log has said why
        raise ConfigError(f"llama.cpp's server cannot run {settings.file}: {error}") from error
    address = urlsplit(server.listening_address)
    assert address.hostname is not None and address.port is not None
    return HttpServer(address.hostname, address.port, api_key, server)


def _params(xllamacpp: Any, settings: ServerSettings) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = settings.file
    params.model_alias = {settings.name}
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel, params.n_ctx = settings.num_seqs, settings.kv_tokens
    params.kv_unified = settings.is_shared
    params.n_batch, params.n_ubatch = settings.num_batched_tokens, settings.num_ubatch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.num_threads
    params.n_threads_http = min(_MAX_HTTP_THREADS, max(8, 2 * settings.num_seqs))
    if settings.is_exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    params.warmup = params.fit_params = False  # what is computed is the job's to say
    params.cache_ram_mib = 0  # of memory that nobody has reckoned with
    params.ui = params.endpoint_slots = params.endpoint_props = False
    params.endpoint_metrics = True
    if settings.chat_template is not None:
        params.chat_template = settings.chat_template
    params.default_template_kwargs = dict(settings.template_kwargs)
    params.n_predict = settings.max_tokens
    sampling = params.sampling
    for name, value in settings.sampling.items():
        setattr(sampling, name, value)
    params.sampling = sampling
    return params
