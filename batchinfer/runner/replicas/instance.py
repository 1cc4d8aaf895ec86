"""An instance of Ray on this machine, for one run: how it is started, reached and ended. Whether
anybody answers where a cluster should be.

Must not know: Ray itself, which only the process knows that is started here.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress

from batchinfer.errors import TransientError

_START_S = 120.0
_REACH_S = 10.0
_END_S = 2.0


def why_unreachable(address: str) -> str | None:
    """Why nobody answers at `host:port`, of which Ray itself would be sure after minutes. None:
    somebody does, or it is an address of another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


class OwnInstance:
    """Ray on this machine for this run alone: a process in a session of its own, so that signals to
    our group reach us and not Ray.
    """

    def __init__(self, module: str) -> None:
        """`module`: what Python runs as that process."""
        self._folder = tempfile.mkdtemp(prefix="batchinfer-ray-", dir=_short_folder())
        # In our environment too, as we connect with the same token.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), self._folder],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
                start_new_session=True,
            )
        self._line.settimeout(_START_S)
        try:
            with self._line.makefile() as lines:
                self.address: str = json.loads(lines.readline())["address"]
        except (OSError, ValueError) as error:
            self.close()
            raise TransientError(
                f"Ray did not start on this machine within {_START_S:g} s: see the run's log"
            ) from error

    def close(self) -> None:
        """End it; it takes a moment longer than this call."""
        self._line.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)


def _short_folder() -> str | None:
    """Ray's sockets are below it, and their names have 107 bytes."""
    return None if len(tempfile.gettempdir()) <= 30 else "/tmp"
