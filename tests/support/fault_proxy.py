"""An HTTP proxy in front of an S3 server that fails requests by rule.

Requests and answers pass unchanged (the signature covers Host, chunked uploads keep their framing)
unless the first rule that matches says otherwise. Rules are set in the process (`proxy.reset`) or
by `POST /__faults__` with a JSON list of rules; `GET /__faults__` answers the requests seen so far.
Creates (`If-None-Match: *`) are passed on one at a time: moto checks, then stores, without a lock,
which no real store does.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, cast
from urllib.parse import unquote, urlsplit

CONTROL_PATH = "/__faults__"
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding"})

Action = Literal["lose_reply", "refuse", "status", "delay", "truncate"]


@dataclass(slots=True)
class Rule:
    """`skip` matching requests pass, then `times` of them are failed (None: all of them).

    lose_reply: the server gets the request, the client no answer. refuse: nobody gets anything.
    status: an S3 error instead of the server, or `body` if there is one. delay: `delay_s` before
    the server gets it. truncate: half of the answer's body. Only of requests without `lacks`, a
    regular expression for a line of the header.
    """

    action: Action
    method: str = ".*"
    path: str = ".*"
    query: str = ""
    skip: int = 0
    times: int | None = 1
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 0.0
    body: str | None = None
    lacks: str | None = None

    def matches(self, request: SeenRequest) -> bool:
        return bool(
            re.fullmatch(self.method, request.method)
            and re.search(self.path, request.path)
            and re.search(self.query, request.query)
            and not (self.lacks and re.search(self.lacks, request.header))
        )


@dataclass(frozen=True, slots=True)
class SeenRequest:
    method: str
    path: str
    query: str
    header: str = ""


class FaultProxy:
    """`url` is where clients go; `seen` are the requests since the last `reset`, in order."""

    def __init__(self, server_url: str) -> None:
        self.server = urlsplit(server_url)
        self.rules: list[Rule] = []
        self.seen: list[SeenRequest] = []
        self.creates = threading.Lock()
        self._lock = threading.Lock()
        self._http = _Server(self)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def reset(self, *rules: Rule) -> None:
        """Forget what was seen, and fail by `rules` from now on."""
        with self._lock:
            self.rules = list(rules)
            self.seen = []

    def num_seen(self, method: str, path: str = "", query: str = "") -> int:
        with self._lock:
            wanted = Rule("delay", method, path, query)
            return sum(wanted.matches(request) for request in self.seen)

    def rule_for(self, request: SeenRequest) -> Rule | None:
        with self._lock:
            self.seen.append(request)
            for rule in self.rules:
                if not rule.matches(request):
                    continue
                if rule.skip:
                    rule.skip -= 1
                elif rule.times is None:
                    return rule
                elif rule.times:
                    rule.times -= 1
                    return rule
        return None


@contextmanager
def fault_proxy(server_url: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server_url)
    try:
        yield proxy
    finally:
        proxy.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed or gave up is what the tests are about: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        """Every method goes the same way, so the base class's do_GET, do_PUT, … are not used."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline:
            self.close_connection = True
        elif self.parse_request():
            self._answer()

    @property
    def _proxy(self) -> FaultProxy:
        return cast(_Server, self.server).proxy

    def log_message(self, format: str, *args: object) -> None:
        """Silent: pytest shows the server's view nowhere."""

    def _answer(self) -> None:
        body = self._read_body()
        target = urlsplit(self.path)
        if target.path == CONTROL_PATH:
            self._control(body)
            return
        path = unquote(target.path)
        seen = SeenRequest(self.command, path, target.query, str(self.headers))
        rule = self._proxy.rule_for(seen)
        action = rule.action if rule else None
        if action == "refuse":
            self.close_connection = True
            return
        if rule and action == "status":
            self._send_error(rule)
            return
        if rule and action == "delay":
            time.sleep(rule.delay_s)
        with self._proxy.creates if "If-None-Match" in self.headers else nullcontext():
            status, headers, content = self._forward(body)
        if action == "lose_reply":
            self.close_connection = True
            return
        if action == "truncate":
            self.close_connection = True
            self._send(status, headers, content, num_sent=len(content) // 2)
            return
        self._send(status, headers, content)

    def _read_body(self) -> bytes:
        """The body as it is on the wire, chunk sizes included."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        raw = bytearray()
        while True:
            line = self.rfile.readline()
            raw += line
            num_bytes = int(line.split(b";")[0], 16)
            if num_bytes:
                raw += self.rfile.read(num_bytes + 2)
                continue
            while line := self.rfile.readline():  # trailers, then an empty line
                raw += line
                if line == b"\r\n":
                    return bytes(raw)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = self._proxy.server
        assert server.hostname
        connection = HTTPConnection(server.hostname, server.port or 80, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() != "expect":  # the client has been told to continue already
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _send(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        num_sent: int | None = None,
    ) -> None:
        """In one piece. The answer to HEAD keeps the length of the body that it does not have."""
        self.send_response_only(status)
        has_length = self.command == "HEAD" or status == 304
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP and (has_length or name.lower() != "content-length"):
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:num_sent])

    def _send_error(self, rule: Rule) -> None:
        error = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f"<Error><Code>{rule.code}</Code><Message>injected</Message></Error>"
        )
        answer = error if rule.body is None else rule.body
        content = b"" if self.command == "HEAD" else answer.encode()
        self._send(rule.status, [("Content-Type", "application/xml")], content)

    def _control(self, body: bytes) -> None:
        proxy = self._proxy
        if self.command == "POST":
            proxy.reset(*(Rule(**rule) for rule in json.loads(body)))
        seen = [asdict(request) for request in proxy.seen]
        self._send(200, [("Content-Type", "application/json")], json.dumps(seen).encode())
