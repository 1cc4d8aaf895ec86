"""A stand-in for the Hugging Face hub: the few routes that downloading a repository takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`files`: "datasets/ORG/NAME" or "models/ORG/NAME" -> revision -> path -> content."""

    files: Mapping[str, Mapping[str, Mapping[str, bytes]]]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    is_up: bool = True  # else whoever asks waits


@contextmanager
def serve_hub(files: Mapping[str, Mapping[str, Mapping[str, bytes]]]) -> Iterator[Hub]:
    """A server on a free port until the block ends."""
    hub = Hub(files)
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if not hub.is_up:
                ended.wait()
                return
            status, headers, content = _answer(hub, unquote(self.path.partition("?")[0]))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


def _answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers, content."""
    for name, revisions in hub.files.items():
        by_name = {
            **revisions,
            SHA: {p: c for files in revisions.values() for p, c in files.items()},
        }
        for revision, files in by_name.items():
            if path in (f"/api/{name}/revision/{revision}", f"/api/{name}"):
                short = name.partition("/")[2]
                info = {"id": short, "sha": SHA, "siblings": [{"rfilename": p} for p in files]}
                return 200, {}, json.dumps(info).encode()
            if path == f"/api/{name}/tree/{revision}":
                tree = [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
                return 200, {}, json.dumps(tree).encode()
            for file, content in files.items():
                if path == f"/{name.removeprefix('models/')}/resolve/{revision}/{file}":
                    etag = hashlib.sha1(content).hexdigest()
                    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}, content
    return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}, b""
