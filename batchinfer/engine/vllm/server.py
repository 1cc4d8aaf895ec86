"""vLLM's own OpenAI-compatible server, for a job: the same engine arguments, its own HTTP.

Must not know: jobs beyond their sections, who watches this process. The engine core has a process
of its own here: vLLM has no other way for a server. Works with vLLM 0.32; where older ones have the
same functions they are looked for there.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from batchinfer.config import Job, thaw
from batchinfer.engine.base import Serving
from batchinfer.engine.host import oom_kills
from batchinfer.engine.vllm.engine import begun, ready_arguments
from batchinfer.engine.vllm.errors import construction_error, first_line
from batchinfer.engine.vllm.failure import Circumstances
from batchinfer.engine.vllm.fit import device_memory
from batchinfer.engine.vllm.gate import Gate, Rules
from batchinfer.engine.vllm.layers import check_moved, checked_layers
from batchinfer.engine.vllm.request_defaults import generation_config, request_values
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.setup import usable_platform
from batchinfer.errors import BatchInferError, ConfigError, EngineDied
from batchinfer.imports import import_failure

log = logging.getLogger(__name__)

#: Modules of the server and of its arguments: from 0.32 on, and before.
_SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
_ARGUMENTS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
_MODELS = ("vllm.entrypoints.openai.models.protocol", "vllm.entrypoints.openai.serving_models")


#: Of the name of a Unix socket; vLLM's are 37 characters below the folder of temporary files.
_MOST_PATH_BYTES = 107
_SOCKET_NAME_BYTES = 37


def _keep_sockets_short() -> None:
    """vLLM names the sockets of its processes by TMPDIR, which may be too long for them."""
    folder = os.environ.get("VLLM_RPC_BASE_PATH", tempfile.gettempdir())
    is_long = len(os.fsencode(folder)) + _SOCKET_NAME_BYTES > _MOST_PATH_BYTES
    if is_long and os.access("/tmp", os.W_OK):
        os.environ["VLLM_RPC_BASE_PATH"] = "/tmp"


def serve_vllm(settings: VllmSettings, job: Job, serving: Serving) -> int:
    """See `ServingKind.serve`."""
    if serving.api_key is not None:
        os.environ.pop("VLLM_API_KEY", None)  # the server would ask for that one as well
    _keep_sockets_short()
    engine = ready_arguments(settings)
    begun(settings.demand, settings)  # a parser that does not fit the model, before it is loaded
    server = _import_server()
    is_cpu = bool(usable_platform().is_cpu())
    circumstances = Circumstances(
        engine,
        settings,
        device_memory(settings.num_devices, is_cpu=is_cpu),
        str(Path(serving.folder) / "failure.json"),
    )
    circumstances.pass_on(Path(serving.folder) / "circumstances")
    rules = Rules(
        serving.api_key,
        request_values(job.sampling),
        lambda state: _check_layers(state.engine_client, settings),
    )
    arguments = server_arguments(engine, settings, job, serving)
    arguments.rules = rules
    num_oom_kills = oom_kills()
    try:
        _run(server, arguments, serving)
    except Exception as error:
        if isinstance(rules.failure or error, BatchInferError):
            raise rules.failure or error from error
        raise _meaning(error, rules, circumstances) from error
    except SystemExit as error:  # of uvicorn, if it cannot start
        raise rules.failure or EngineDied(
            f"vLLM's server did not start (exit {error.code}); its log has the whole story"
        ) from error
    if rules.failure is not None:
        raise rules.failure
    if not rules.is_stopping:
        why = (
            ", ended by the kernel as the host's memory did not suffice"
            if (oom_kills() > num_oom_kills)
            else ""
        )
        raise circumstances.told() or EngineDied(
            f"a process of the vLLM engine died{why}; the server's log has what it said last"
        )
    return rules.num_cut


def server_arguments(
    engine: dict[str, Any], settings: VllmSettings, job: Job, serving: Serving
) -> Any:
    """What vLLM's command line would make of the job: a Namespace. Nothing in it is secret."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    module = _first(_ARGUMENTS)
    arguments = module.make_arg_parser(FlexibleArgumentParser()).parse_args([])
    host, port = serving.socket.getsockname()[:2]
    engine = dict(engine)
    overridden = dict(engine.get("override_generation_config") or {})
    engine["override_generation_config"] = overridden | generation_config(job.sampling)
    name = serving.model_name
    if settings.loras:
        module_path = _first(_MODELS).LoRAModulePath
        named = [(other, lora.path) for other, lora in settings.adapters.items()]
        if settings.lora is not None:
            named.insert(0, (name, settings.lora.path))
            name = base_name(settings.model_path, name)
        arguments.lora_modules = [module_path(*one) for one in named]
    engine.setdefault("served_model_name", [name])
    if isinstance(engine["served_model_name"], str):
        engine["served_model_name"] = [engine["served_model_name"]]
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "middleware": [f"{Gate.__module__}.{Gate.__qualname__}"],
        "disable_uvicorn_access_log": not serving.logs_requests,
        "default_chat_template_kwargs": thaw(job.prompt.chat_template_kwargs) or None,
    }
    if serving.chat_template is not None:  # given as text, its escapes would be read once more
        path = Path(serving.folder) / "chat_template.jinja"
        path.write_text(serving.chat_template, encoding="utf-8")
        given["chat_template"] = str(path)
    for key, value in {**engine, **given}.items():
        setattr(arguments, key, value)
    return arguments


def base_name(model_path: str, adapter_name: str) -> str:
    """What clients call the model without its adapter."""
    name = Path(model_path).name
    return name if name != adapter_name else f"{name}-base"


def _run(server: Any, arguments: Any, serving: Serving) -> None:
    import uvloop

    host, port = serving.socket.getsockname()[:2]
    uvloop.run(
        server.run_server_worker(
            f"http://{host}:{port}",
            serving.socket,
            arguments,
            timeout_graceful_shutdown=int(serving.drain_s),
        )
    )


async def _check_layers(engine_client: Any, settings: VllmSettings) -> None:
    """As a run checks them."""
    reports = await engine_client.collective_rpc("report_layers")
    taken = engine_client.vllm_config.model_config.quantization
    layers = checked_layers(reports, taken, settings)
    log.info("layers: %s", layers)
    check_moved(layers, settings.cpu_offload_gib)


def _meaning(error: Exception, rules: Rules, circumstances: Circumstances) -> BatchInferError:
    """What it means that the server ended with an error."""
    if told := circumstances.told():
        return told
    if rules.is_started:
        return EngineDied(f"vLLM's server died: {type(error).__name__}: {first_line(error)}")
    return construction_error(
        error, circumstances.arguments, circumstances.settings, circumstances.memory
    )


def _import_server() -> Any:
    try:
        return _first(_SERVERS)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "vllm", "batchinfer"):
            raise import_failure("vLLM's server", error) from error
        raise ConfigError(
            f"vLLM's server needs the Python package {package}, which is not installed: "
            "`make setup` installs all that it needs"
        ) from error
    except Exception as error:  # a package below it may raise anything while it is imported
        raise import_failure("vLLM's server", error) from error


def _first(modules: tuple[str, ...]) -> Any:
    """The first of these modules that is there."""
    for name in modules[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name and f"{name}.".startswith(f"{error.name}.")):
                raise
    return importlib.import_module(modules[-1])
