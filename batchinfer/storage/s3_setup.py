"""What of this machine's own set-up keeps a request from a store: variables, certificates, scheme.

Must not know: requests, answers. Never repeats a variable's value, which may be a secret.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from urllib.parse import urlsplit

_PROBE_TIMEOUT_S = 5
#: OpenSSL's word for an answer that is not TLS at all.
_NOT_TLS = "WRONG_VERSION_NUMBER"
#: Passes when other files are closed, or memory is free again; all else needs somebody.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


def odd_variables() -> str:
    """The AWS variables that hold what none can hold, as words; "" if there are none."""
    odd = []
    for name, value in sorted(os.environ.items()):
        if name.startswith("AWS_") and any(ord(c) < 32 or ord(c) == 127 for c in value):
            what = "a newline" if "\n" in value or "\r" in value else "a control character"
            odd.append(f"{name} contains {what}")
        elif name.startswith("AWS_") and value != value.strip():
            odd.append(f"{name} begins or ends with a space")
    return ", ".join(odd)


def set_up_wrong(error: BaseException | None) -> str | None:
    """What is wrong here and stays so, as a sentence. None: `error` may be another's fault.

    `error`: what botocore met while it sent a request.
    """
    from aiohttp import ClientError as HttpClientError
    from aiohttp import ClientSSLError
    from botocore.exceptions import InvalidProxiesConfigError

    if isinstance(error, ClientSSLError):
        if getattr(error.__cause__ or error.__context__, "reason", None) == _NOT_TLS:
            return (
                "the endpoint does not speak TLS: write http:// and not https:// in "
                "s3.endpoint_url (AWS_ENDPOINT_URL)"
            )
        return None
    if isinstance(error, InvalidProxiesConfigError):
        return "a proxy's URL is malformed: correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
    if isinstance(error, HttpClientError):
        return None
    if isinstance(error, ssl.SSLError):
        return f"there are no certificates in {_bundle()} ({error.reason or error})"
    if isinstance(error, TimeoutError | ConnectionError | socket.gaierror):
        return None
    if isinstance(error, OSError) and error.errno not in _PASSING:
        file = f"{error.filename}, which the AWS set-up names" if error.filename else _bundle()
        return f"cannot read {file}: {error.strerror or error}"
    if isinstance(error, ValueError):
        return f"{str(error).strip().rstrip('.')}. {_what_variables()}"
    return None


def right_scheme(endpoint_url: str) -> str | None:
    """The scheme that the server answers to, if it is another than that of `endpoint_url`.

    None where that is not certain. Asked after a connection was lost without an answer.
    """
    url = urlsplit(endpoint_url)
    is_tls = url.scheme == "https"
    with contextlib.suppress(OSError, ValueError):
        address = (url.hostname or "", url.port or (443 if is_tls else 80))
        with socket.create_connection(address, _PROBE_TIMEOUT_S) as connection:
            if is_tls:
                connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
                # 400 is also what servers say to plain HTTP on a port for TLS.
                answer = connection.recv(16)
                return "http" if answer[:7] == b"HTTP/1." and answer[9:12] != b"400" else None
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(connection, server_hostname=url.hostname):
                return "https"
    return None


def _bundle() -> str:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        if path := os.environ.get(name):
            return f"{path}, the file of certificates that {name} names"
    return "the file of certificates that ca_bundle in the AWS configuration file names"


def _what_variables() -> str:
    if odd := odd_variables():
        return f"{odd}: correct that"
    names = ", ".join(sorted(name for name in os.environ if name.startswith("AWS_")))
    return f"Check s3.endpoint_url and what is set here: {names or 'the AWS configuration file'}"
