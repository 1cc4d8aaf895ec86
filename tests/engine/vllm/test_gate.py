"""What stands before vLLM's server, without vLLM: the key, and a job's defaults in requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.engine.client_requests import completed
from batchinfer.engine.vllm.gate import Gate, Rules
from batchinfer.engine.vllm.request_defaults import SAID_BY, generation_config, request_values


class Asked:
    """An application behind the gate that keeps the body it gets, and what is sent back."""

    def __init__(self, *, api_key: str | None = None, values: dict[str, Any] | None = None) -> None:
        self.rules = Rules(api_key, values or {}, check=lambda state: asyncio.sleep(0))
        self.body: bytes | None = None
        self.length = ""
        self.sent: list[dict[str, Any]] = []

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = b""
        self.length = dict(scope["headers"]).get(b"content-length", b"").decode()
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break

    def request(
        self,
        path: str = "/v1/completions",
        *parts: bytes,
        headers: dict[str, str] | None = None,
        **scope: Any,
    ) -> Any:
        """The body that came through, as JSON if it is; None: nothing came through."""
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages.append({"type": "http.request", "body": b"", "more_body": False})
        state = SimpleNamespace(args=SimpleNamespace(rules=self.rules))
        whole = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
            "app": SimpleNamespace(state=state),
            **scope,
        }

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            self.sent.append(message)

        asyncio.run(Gate(self.application)(whole, receive, send))
        try:
            return None if self.body is None else json.loads(self.body)
        except ValueError:
            return self.body


def test_a_request_that_does_not_say_gets_what_the_job_says() -> None:
    """Its length is that of the new body; a body may come in pieces."""
    asked = Asked(values={"max_tokens": 48, "seed": 3})
    found = asked.request("/v1/completions", b'{"prompt":', b' "x", "seed": null}')
    assert found == {"prompt": "x", "max_tokens": 48, "seed": 3}
    assert asked.body is not None and asked.length == str(len(asked.body))


def test_what_a_request_says_is_kept() -> None:
    values = {"max_tokens": 48, "stop": ["a"], "structured_outputs": {"json": {}}}
    for said in (
        {"max_tokens": 0, "stop": [], "response_format": {"type": "text"}},
        {"max_completion_tokens": 9, "stop": "b", "structured_outputs": {"regex": "x"}},
        {"max_tokens": 9, "stop": ["b"], "tools": []},
    ):
        assert completed(said, values, SAID_BY) == said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b"not JSON"),
        ("/v1/completions", b"[1, 2]"),
        ("/v1/completions", b"\xff\xfe"),
        ("/v1/embeddings", b'{"input": "x"}'),
    ],
)
def test_other_bodies_pass_unchanged(path: str, body: bytes) -> None:
    """vLLM says what is wrong with them."""
    asked = Asked(values={"max_tokens": 48})
    asked.request(path, body)
    assert asked.body == body


@pytest.mark.parametrize(
    ("header", "passes"),
    [
        ("Bearer secret", True),
        ("bearer secret", True),
        ("Bearer secre", False),
        ("Bearer secret2", False),
        ("Basic secret", False),
        ("secret", False),
        ("", False),
    ],
)
def test_a_key_opens_and_nothing_else_does(header: str, passes: bool) -> None:
    asked = Asked(api_key="secret")
    asked.request("/v1/completions", b"{}", headers={"authorization": header} if header else {})
    assert (asked.body is not None) is passes
    if not passes:
        assert asked.sent[0]["status"] == 401
        assert "secret" not in str(asked.sent)


@pytest.mark.parametrize(
    "path", ["/invocations", "/metrics", "/v1/models", "/health/", "//health", "/v1/../health"]
)
def test_health_alone_is_open(path: str) -> None:
    asked = Asked(api_key="secret")
    assert asked.request(path, method="GET") is None
    assert Asked(api_key="secret").request("/health", method="GET") == b""
    assert Asked().request(path, b"{}") == {}, "without a key all is"


def test_a_websocket_needs_the_key_too() -> None:
    asked = Asked(api_key="secret")
    asked.request("/v1/realtime", type="websocket")
    assert asked.body is None and asked.sent == [{"type": "websocket.close", "code": 1008}]


def test_a_request_that_the_end_cuts_off_is_counted() -> None:
    def cancelled(rules: Rules) -> Callable[..., Any]:
        async def application(*_: Any) -> None:
            raise asyncio.CancelledError

        return application

    asked = Asked()
    asked.application = cancelled(asked.rules)
    for is_stopping, count in ((False, 0), (True, 1)):
        asked.rules.is_stopping = is_stopping
        with pytest.raises(asyncio.CancelledError):
            asked.request("/v1/completions", b"{}")
        assert asked.rules.num_cut == count


def test_every_sampling_value_is_a_default_somewhere() -> None:
    """But those that say how often a row is computed, and what is told of it."""
    sampling = SamplingSettings(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        stop=("a",),
        stop_token_ids=(5,),
        seed=0,
        ignore_eos=True,
        reasoning_parser="qwen3",
        thinking_budget_tokens=4,
        structured={"choice": ["x", "y"]},
    )
    values = generation_config(sampling) | request_values(sampling)
    assert values.pop("structured_outputs") == {"choice": ["x", "y"]}
    assert values.pop("thinking_token_budget") == 4
    # The parser is the engine's, as it was loaded.
    elsewhere = {"structured", "thinking_budget_tokens", "reasoning_parser", "per_row"}
    names = set(SamplingSettings.model_fields) - {"n", "logprobs", "prompt_logprobs"} - elsewhere
    assert values.keys() == names
    for name, value in values.items():
        given = getattr(sampling, name)
        assert value == (list(given) if isinstance(given, tuple) else given), name


def test_a_cap_is_never_set() -> None:
    """vLLM's server reads `max_new_tokens` of a generation config as the most that is allowed."""
    sampling = SamplingSettings()
    assert "max_new_tokens" not in generation_config(sampling)
    assert request_values(sampling) == {"max_tokens": 256}, "vLLM's own defaults are not repeated"
