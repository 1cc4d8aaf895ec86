"""A job's model behind llama.cpp's own server.

Must not know: how a server is watched.
"""

from __future__ import annotations

import http.client
import json
import logging
import signal
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from batchinfer.config import thaw
from batchinfer.engine.base import EngineSpec, Serving
from batchinfer.engine.client_requests import completed
from batchinfer.engine.llama_cpp.gate import Gate, Rules
from batchinfer.engine.llama_cpp.request_defaults import (
    CHAT_PATHS,
    PATHS,
    SAID_BY,
    check_served,
    request_values,
    schema_of,
    server_sampling,
    translated,
)
from batchinfer.engine.llama_cpp.sampling import GUIDANCE, unreadable
from batchinfer.engine.llama_cpp.sizes import MAX_UBATCH, num_threads, sizes_of
from batchinfer.errors import ConfigError
from batchinfer.llama_cpp.guidance import why_unreadable
from batchinfer.llama_cpp.http_server import HttpServer, ServerSettings, start_server
from batchinfer.llama_cpp.probe import check_loadable
from batchinfer.model import has_chat_template

log = logging.getLogger(__name__)

_NUM_SCHEMAS = 256  # of which it is known whether they can be read


def serve_llama_cpp(spec: EngineSpec, serving: Serving) -> int:
    """See `ServingKind.serve`."""
    file, sampling = spec.model.path, spec.job.sampling
    check_served(sampling)
    if spec.job.model.tokenizer is not None:
        raise ConfigError(
            "model.tokenizer: llama.cpp's server has the tokenizer of the GGUF file alone: leave "
            "the key out"
        )
    if sampling.structured is not None:
        kind, value = sampling.structured.constraint
        if kind in GUIDANCE:
            text = value if isinstance(value, str) else json.dumps(value)
            if why := why_unreadable(file, GUIDANCE[kind], text):
                raise unreadable(kind, value, why)
    check_loadable(file)
    stopped = threading.Event()
    server = start_server(server_settings(spec, serving))
    values = request_values(sampling)
    _try(server, values)
    chats = serving.chat_template is not None or has_chat_template(Path(file))
    rules = Rules(
        host=server.host,
        port=server.port,
        inner_key=server.api_key,
        api_key=serving.api_key,
        change=Changes(file, values, has_chats=chats),
        logs_requests=serving.logs_requests,
    )
    gate = Gate(serving.socket, rules)
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    gate.open()
    log.info("llama.cpp's server answers at %s:%d behind the gate", server.host, server.port)
    stopped.wait()
    return gate.close(serving.drain_s)


def server_settings(spec: EngineSpec, serving: Serving) -> ServerSettings:
    sizes, sampling = sizes_of(spec), spec.job.sampling
    template_kwargs = thaw(spec.job.prompt.chat_template_kwargs)
    return ServerSettings(
        file=spec.model.path,
        name=serving.model_name,
        num_seqs=sizes.max_num_seqs,
        kv_tokens=sizes.kv_tokens,
        is_shared=sizes.is_shared,
        num_batched_tokens=sizes.max_num_batched_tokens,
        num_ubatch=min(sizes.max_num_batched_tokens, MAX_UBATCH),
        num_threads=num_threads(spec),
        is_exact=spec.model.dtype == "float32",
        chat_template=serving.chat_template,
        template_kwargs={name: json.dumps(value) for name, value in template_kwargs.items()},
        sampling=server_sampling(sampling),
        max_tokens=sampling.max_tokens,
    )


class Changes:
    """A request's body as llama.cpp's server gets it."""

    def __init__(self, file: str, values: dict[str, Any], *, has_chats: bool) -> None:
        self._values = values
        self._has_chats = has_chats

        @lru_cache(maxsize=_NUM_SCHEMAS)
        def why(schema: str) -> str | None:
            return why_unreadable(file, "json", schema)

        self._why = why

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a request that would be answered as if it said something else."""
        if path not in PATHS:
            return body
        if path in CHAT_PATHS and not self._has_chats:
            raise ValueError(
                "the model brings no chat template, and the job has none (prompt.chat_template): "
                "ask for a completion"
            )
        body = translated(body)
        if (schema := schema_of(body)) is not None and (why := self._why(schema)):
            raise ValueError(f"llama.cpp cannot read the JSON schema: {why}")
        return completed(body, self._values, SAID_BY)


def _try(server: HttpServer, values: dict[str, Any]) -> None:
    """One token as every request gets them. Raises ConfigError for what llama.cpp refuses."""
    connection = http.client.HTTPConnection(server.host, server.port)
    body = json.dumps({"prompt": "a", "max_tokens": 1, **values})
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.api_key}"}
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.status != 200:
        words = json.loads(content).get("error", {}).get("message", "it gives no reason")
        raise ConfigError(f"llama.cpp refuses the sampling settings: {words}")
