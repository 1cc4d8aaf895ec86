"""The process of a server, `python -m batchinfer.serving.child`: reads a `ServerOrder` from stdin.

What ends it is written to `report.json` in its folder: (name of the error's class, message, its
code), or the number of requests that were cut off. Invariant: it never outlives its parent. Must
not know: signals but the one that stops a server, any engine.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from batchinfer.config import thaw
from batchinfer.engine.base import EngineSpec, Serving, ServingKind
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import BatchInferError, exit_code_of
from batchinfer.runner.factory import with_weights
from batchinfer.runner.shortage import shortages
from batchinfer.serving.order import REPORT, ServerOrder
from batchinfer.signals import end_with
from batchinfer.telemetry.logs import HumanFormatter

_SERVER_PID = "BATCHINFER_SERVER_PID"


def main() -> NoReturn:
    """Serve, and end the process: 0 after a drain, else the code of the error."""
    order: ServerOrder = pickle.load(sys.stdin.buffer)
    end_with(order.parent_pid)
    os.environ[_SERVER_PID] = str(os.getpid())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HumanFormatter(is_file=True))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    code, report = 0, dict[str, str | int]()
    try:
        with shortages(is_run=False):
            report = {"num_cut": serve(order)}
    except BaseException as error:  # the process's edge
        code = exit_code_of(error)
        message = str(error)
        if not isinstance(error, BatchInferError):
            message = "".join(traceback.format_exception_only(error)).strip()
            message = f"internal error: {message}"
        logging.getLogger("batchinfer.serving").exception("the server failed")
        report = {"error": type(error).__name__, "message": message}
    path = Path(order.folder, REPORT)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report))
    temporary.rename(path)
    sys.stderr.flush()
    os._exit(code)  # its engine's processes end with it


def serve(order: ServerOrder) -> int:
    """Raises what `ServingKind.serve` raises, and ConfigError for a chat template that is none."""
    kind = engine_kind(order.spec.job.engine.name)
    assert isinstance(kind, ServingKind), "prepare has refused it"
    kind.prepare(order.spec)
    spec = with_weights(order.spec)
    serving = Serving(
        socket=socket.socket(fileno=order.socket_fd),
        model_name=spec.job.name,
        api_key=order.api_key,
        chat_template=_chat_template(spec),
        drain_s=order.drain_s,
        folder=order.folder,
        logs_requests=order.logs_requests,
    )
    return kind.serve(spec, serving)


def _end_with_server() -> None:
    """For a process of the engine, before what takes it long: half a minute of imports, and up to
    five in which vLLM's waits for a server that is gone.
    """
    end_with(os.getppid())
    try:
        os.kill(int(os.environ[_SERVER_PID]), 0)
    except ProcessLookupError:  # it died before the line above
        os._exit(1)


def _chat_template(spec: EngineSpec) -> str | None:
    """The text of the job's; by name it may be one of the tokenizer's."""
    prompt = spec.job.prompt
    if prompt.chat_template is None:
        return None
    from batchinfer.prompt.chat import ChatTemplate
    from batchinfer.prompt.encode import TokenEncoder

    encoder = TokenEncoder(
        spec.model.tokenizer_path, trust_remote_code=spec.job.model.trust_remote_code
    )
    arguments = thaw(prompt.chat_template_kwargs)
    return ChatTemplate(encoder.tokenizer, prompt.chat_template, arguments).source


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # of an engine's process, spawned below this one, at its beginning
    _end_with_server()
