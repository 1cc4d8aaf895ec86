"""A real S3 server over HTTP for tests: moto on a free port, and the environment that uses it."""

from __future__ import annotations

import logging
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class S3Server:
    """`url` is the server's own; `environment` can lead to a proxy in front of it."""

    url: str

    def environment(self, endpoint_url: str | None = None) -> dict[str, str]:
        """What a process needs to use the server, and nothing of the machine's own AWS set-up."""
        return {
            "AWS_ENDPOINT_URL": endpoint_url or self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def create_bucket(self) -> str:
        """A new, empty bucket of a name that no other test has."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            return name


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serves from a thread of this process; other processes reach it by its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()
