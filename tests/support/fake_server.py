"""The process of `batchinfer serve`, with a server that has no model (see fake_run).

FAKE_SERVER (JSON): {"load_s": seconds before it listens, "error": [class, message] it ends with
instead, "answer_s": seconds that POST takes, "is_deaf": it ignores SIGTERM}. POST /die ends it, as
the kernel would. A child process of its own sleeps as long as it lives: an engine's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from batchinfer import errors
from batchinfer.engine.base import EngineSpec, Serving
from batchinfer.engine.kinds import KINDS
from batchinfer.serving.child import main
from batchinfer.testing import FakePlan
from tests.support.fake_run import FakeVllm

SETTINGS: dict[str, Any] = {"load_s": 0.0, "answer_s": 0.0, "is_deaf": False, "error": None}
SETTINGS |= json.loads(os.environ.get("FAKE_SERVER", "{}"))
#: What multiprocessing does first in a process that it spawns; then what an engine does here.
_ENGINE = """import runpy, time
runpy.run_module("batchinfer.serving.child", run_name="__mp_main__")
print(flush=True)
time.sleep(600)"""


class FakeServing(FakeVllm):
    """Serves without loading anything."""

    def serve(self, spec: EngineSpec, serving: Serving) -> int:
        engine = subprocess.Popen([sys.executable, "-c", _ENGINE], stdout=subprocess.PIPE)
        assert engine.stdout is not None and engine.stdout.readline() == b"\n"
        time.sleep(SETTINGS["load_s"])
        if SETTINGS["error"]:
            name, message = SETTINGS["error"]
            raise getattr(errors, name, RuntimeError)(message)
        server = _Server(serving.socket.getsockname(), _Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = serving.socket
        server.server_activate()
        if SETTINGS["is_deaf"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(
                signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start()
            )
        sys.stdout.write("the engine's own words\n")
        sys.stdout.flush()
        server.serve_forever(poll_interval=0.05)
        server.server_close()  # which waits for the threads of requests
        return 0


class _Server(ThreadingHTTPServer):
    daemon_threads = False


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(b"{}")

    def do_POST(self) -> None:
        if self.path == "/die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SETTINGS["answer_s"])
        self._answer(b'{"answer": 1}')

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


if __name__ == "__main__":
    KINDS["vllm"] = lambda: FakeServing(FakePlan())
    main()
