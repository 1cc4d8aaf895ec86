"""A real S3 server over HTTP for tests: moto on a free port, and the environment that uses it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.forks import python_path

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
def s3_server(**environ: str) -> Iterator[S3Server]:
    """Serves from a process of its own: Flask's globals and vLLM in one process do not agree.

    `environ`: variables by which moto is set up.
    """
    port = _free_port()
    command = [sys.executable, "-m", "tests.support.moto_server", str(port)]
    process = subprocess.Popen(
        command,
        env=os.environ | environ | {"MOTO_PORT": str(port), "PYTHONPATH": python_path()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError("the S3 server did not start")
