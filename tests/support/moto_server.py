"""moto's S3 alone, with connections that stay open, as those of a real store do.

    python -m tests.support.moto_server PORT

moto's own server looks through the folders of all its services at each request, which is two thirds
of its work; and werkzeug's handler closes the connection after each answer, once it has listened
for another 10 ms.
"""

from __future__ import annotations

import io
import sys
from http import HTTPStatus
from typing import Any

from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

_OURS = frozenset({"connection", "transfer-encoding"})


class _Handler(MotoRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one write

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Silent: nobody reads it."""

    def run_wsgi(self) -> None:
        """Reads the whole request first, so that the next one begins where it ends."""
        if self.headers.get("Expect", "").lower().strip() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        environ = self.make_environ()
        is_chunked = environ.get("wsgi.input_terminated", False)
        length = -1 if is_chunked else int(self.headers.get("Content-Length", 0))
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        begun: list[Any] = [f"{HTTPStatus.INTERNAL_SERVER_ERROR.value} the server failed", []]

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            begun[:] = status, headers

        try:
            answer = self.server.app(environ, start)
            content = b"".join(answer)
            getattr(answer, "close", lambda: None)()
        except Exception as error:
            self.log_error("%r", error)
            content = b""
        status, headers = begun
        self._send(status, headers, content)

    def _send(self, status: str, headers: list[tuple[str, str]], content: bytes) -> None:
        """The answer to HEAD keeps the length of the body that it does not have."""
        code, _, reason = status.partition(" ")
        self.send_response(int(code), reason)
        has_length = self.command == "HEAD" or code in ("204", "304")
        for name, value in headers:
            if name.lower() not in _OURS and (has_length or name.lower() != "content-length"):
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(b"" if has_length else content)
        self.wfile.flush()


def main(port: int) -> None:
    app = create_backend_app("s3")
    make_server("127.0.0.1", port, app, threaded=True, request_handler=_Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
