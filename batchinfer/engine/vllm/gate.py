"""What stands before vLLM's server: the key, the job's defaults, and how it is stopped.

An ASGI middleware, which vLLM takes by name (its `--middleware`). vLLM's own key guards /v1 and
leaves other ways to the same model open (/invocations); its own stop takes requests while it
drains. Must not know: engines, vLLM.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from batchinfer.engine.client_requests import completed
from batchinfer.engine.vllm.request_defaults import PATHS, SAID_BY

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Who watches a server asks this, and has no key.
OPEN_PATHS = ("/health",)


@dataclass(slots=True)
class Rules:
    """Made before the server and kept by it as `app.state.args.rules`."""

    api_key: str | None = field(repr=False)
    values: Mapping[str, Any]  # see `request_values`
    check: Callable[[Any], Awaitable[None]]  # of the application, once its model is loaded
    is_started: bool = False
    is_stopping: bool = False
    num_cut: int = 0  # requests that had not ended when the server did
    failure: Exception | None = None  # what `check` raised

    def stop(self, server: Any) -> None:
        """Take no more requests, and end once those in flight have ended. `server`: uvicorn's."""
        self.is_stopping = True
        server.should_exit = True


class Gate:
    """Between the HTTP server and the application."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of one request, or of the server's whole life (`lifespan`)."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        rules: Rules = scope["app"].state.args.rules
        if not may_pass(scope, rules.api_key):
            await _refuse(scope, send)
            return
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in PATHS:
            scope, receive = await _with_values(scope, receive, rules.values)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            rules.num_cut += rules.is_stopping
            raise

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        rules: Rules = state.args.rules

        async def sent(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await rules.check(state)
                except Exception as error:
                    rules.failure = error
                    message = {"type": "lifespan.startup.failed", "message": str(error)}
                else:
                    loop = asyncio.get_running_loop()
                    # In place of vLLM's, which it has set by now.
                    loop.add_signal_handler(signal.SIGTERM, rules.stop, state.server)
                    rules.is_started = True
            await send(message)

        await self._app(scope, receive, sent)


def may_pass(scope: Scope, api_key: str | None) -> bool:
    """Whether a request is for everybody or brings the key."""
    if api_key is None or scope["path"] in OPEN_PATHS:
        return True
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), api_key.encode())


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = {"message": "the API key is missing or wrong", "type": "invalid_request_error"}
    content = json.dumps({"error": {**error, "param": None, "code": "invalid_api_key"}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _with_values(
    scope: Scope, receive: Receive, values: Mapping[str, Any]
) -> tuple[Scope, Receive]:
    """The request with `values` in its body; unchanged if that is not a JSON object."""
    parts: list[bytes] = []
    has_more = True
    while has_more:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone
            return scope, _replayed([message], receive)
        parts.append(message.get("body", b""))
        has_more = message.get("more_body", False)
    content = b"".join(parts)
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if isinstance(body, dict):
        content = json.dumps(completed(body, values, SAID_BY)).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        scope = {**scope, "headers": headers}
    return scope, _replayed([{"type": "http.request", "body": content}], receive)


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """`messages`, then what comes (that the client has gone)."""

    async def replay() -> Message:
        return messages.pop(0) if messages else await receive()

    return replay
