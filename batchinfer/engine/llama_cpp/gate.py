"""What stands before llama.cpp's server: the key, the job's defaults, and how it is stopped.

An HTTP server that passes requests on to the one at a port of this machine, and their answers back
as they come. llama.cpp's own has no end but that of its process, and leaves lists open without the
key. Must not know: jobs, the library.
"""

from __future__ import annotations

import hmac
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Who watches a server asks this, and has no key.
OPEN_PATHS = ("/health",)
#: Headers that are of one connection, or said anew here.
_OWN = frozenset(
    ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding", "upgrade")
)
_LOOK_S = 0.05
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What the gate keeps to, and what is behind it."""

    host: str
    port: int
    inner_key: str = field(repr=False)
    api_key: str | None = field(repr=False)
    #: (path, body) of a POST -> the body that is passed on. ValueError: the client's mistake.
    change: Callable[[str, dict[str, Any]], dict[str, Any]]
    logs_requests: bool = False


class Gate:
    """Made of a socket that is bound; listens from `open` on."""

    def __init__(self, bound: socket.socket, rules: Rules) -> None:
        self._server = _Server(bound, rules)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_S,), name="gate", daemon=True
        )

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    @property
    def num_in_flight(self) -> int:
        """Requests that are not answered to their end."""
        return self._server.num_in_flight

    def open(self) -> None:
        self._server.server_activate()
        self._thread.start()

    def close(self, drain_s: float) -> int:
        """Take no more requests and let those in flight end: how many had not when time was up."""
        self._server.is_closing = True
        self._server.shutdown()
        self._server.socket.close()
        deadline_s = time.monotonic() + drain_s
        while self.num_in_flight and time.monotonic() < deadline_s:
            time.sleep(_LOOK_S)
        return self.num_in_flight


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bound: socket.socket, rules: Rules) -> None:
        super().__init__(bound.getsockname()[:2], _Request, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.rules = rules
        self.is_closing = False
        self.num_in_flight = 0
        self._lock = threading.Lock()

    def count(self, change: int) -> None:
        with self._lock:
            self.num_in_flight += change

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is nobody's fault; `_Request` answers for the rest."""


class _Request(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llama.cpp", ""
    disable_nagle_algorithm = True

    def pass_on(self) -> None:
        """Of any method."""
        self.server.count(1)
        try:
            self._pass_on()
        finally:
            self.server.count(-1)

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = pass_on

    def _pass_on(self) -> None:
        rules, path = self.server.rules, self.path.partition("?")[0]
        if self.server.is_closing:
            self._refuse(503, "the server is being stopped", "unavailable_error")
            return
        if path not in OPEN_PATHS and not self._has_key(rules.api_key):
            self._refuse(401, "the API key is missing or wrong", "invalid_request_error")
            return
        length = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not length.isdecimal():
            self._refuse(411, "a body needs a content-length", "invalid_request_error")
            return
        content = self.rfile.read(int(length))
        if self.command == "POST":
            try:
                content = self._changed(path, content)
            except ValueError as error:
                self._refuse(400, str(error), "invalid_request_error", closes=False)
                return
        self._answer(content)

    def _has_key(self, api_key: str | None) -> bool:
        if api_key is None:
            return True
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        return scheme.lower() == "bearer" and hmac.compare_digest(given, api_key.encode())

    def _changed(self, path: str, content: bytes) -> bytes:
        """Unchanged if it is not a JSON object: the server says what it thinks of it."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return content
        if not isinstance(body, dict):
            return content
        return json.dumps(self.server.rules.change(path, body)).encode()

    def _answer(self, content: bytes) -> None:
        rules = self.server.rules
        inner = http.client.HTTPConnection(rules.host, rules.port)
        try:
            headers = {"authorization": f"Bearer {rules.inner_key}"}
            if kind := self.headers.get("content-type"):
                headers["content-type"] = kind
            inner.request(self.command, self.path, content or None, headers)
            self._copy(inner.getresponse())
        except (http.client.HTTPException, ConnectionError) as error:
            self.close_connection = True
            self.log_error("%s: %s", type(error).__name__, error)
        finally:
            inner.close()  # of a stream: what is still computed for it is given up

    def _copy(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _OWN and not name.lower().startswith("access-control-"):
                self.send_header(name, value)
        is_chunked = answer.length is None and self.request_version == "HTTP/1.1"
        if answer.length is not None:
            self.send_header("content-length", str(answer.length))
        elif is_chunked:
            self.send_header("transfer-encoding", "chunked")
        else:
            self.send_header("connection", "close")
        self.end_headers()
        while piece := answer.read1(_PIECE_BYTES):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, status: int, message: str, kind: str, *, closes: bool = True) -> None:
        error = {"message": message, "type": kind, "param": None, "code": status}
        content = json.dumps({"error": error}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        if status == 401:
            self.send_header("www-authenticate", "Bearer")
        if closes:  # the body was not read
            self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if self.server.rules.logs_requests:
            super().log_request(code, size)
