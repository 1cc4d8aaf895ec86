"""Where a server listens. The address is taken before the model is loaded: a start that cannot have
it ends immediately, and nobody else can take it meanwhile.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass

from batchinfer.errors import ConfigError, TransientError


@dataclass(frozen=True, slots=True)
class Address:
    """What a bound socket listens at, or will."""

    host: str  # an IP address
    port: int

    @classmethod
    def of(cls, bound: socket.socket) -> Address:
        host, port = bound.getsockname()[:2]
        return cls(host, port)

    @property
    def url(self) -> str:
        """Of the server, as this machine reaches it."""
        return (
            f"http://{f'[{self.reached_at}]' if ':' in self.host else self.reached_at}:{self.port}"
        )

    @property
    def reached_at(self) -> str:
        """The address that this machine connects to."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that has the address and does not listen yet. Port 0: any that is free.

    Raises TransientError if another process has it, ConfigError if nobody here can have it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise ConfigError(
            f"--host {host}: {reason}. Give an address of this machine, such as 127.0.0.1"
        ) from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended
        bound.bind(address)
        # Until it listens, others that reuse addresses could take this one, too. See `let_go`.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        bound.close()
        raise _meaning(error, host, port) from error
    return bound


def let_go(bound: socket.socket) -> None:
    """Leave a socket to the process that listens at it now: nobody else can take the address, and
    connections that have ended must not keep it from the next start.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.close()


def _meaning(error: OSError, host: str, port: int) -> ConfigError | TransientError:
    if error.errno == errno.EADDRINUSE:
        return TransientError(
            f"port {port} of {host} is in use by another process: end that, or give another --port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"--port {port}: this user may not listen there. Give one above 1023")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ConfigError(
        f"--host {host}, --port {port}: {reason}. Give an address of this machine, such as "
        "127.0.0.1"
    )
