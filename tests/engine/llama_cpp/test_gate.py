"""What stands before llama.cpp's server: requests as they are passed on, and how it ends.

On a server without a model; the real one is in tests/end_to_end/test_serve_llama_cpp.py.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.engine.client_requests import completed
from batchinfer.engine.llama_cpp.gate import Gate, Rules
from batchinfer.engine.llama_cpp.request_defaults import (
    SAID_BY,
    check_served,
    request_values,
    server_sampling,
    translated,
)
from batchinfer.errors import ConfigError


class Inner(BaseHTTPRequestHandler):
    """Tells what it got; /slow waits for `may_end`."""

    may_end = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/slow":
            self.may_end.wait(30)
        told = {"body": body.decode(), "key": self.headers["authorization"]}
        self.send_response(418)
        self.send_header("x-own", "kept")
        self.send_header("access-control-allow-origin", "*")
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

    def log_message(self, *_: Any) -> None:
        pass


def changed(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if "refused" in body:
        raise ValueError("not this one")
    return {**body, "more": path}


@pytest.fixture
def gate() -> Iterator[Gate]:
    inner = ThreadingHTTPServer(("127.0.0.1", 0), Inner)
    threading.Thread(target=inner.serve_forever, daemon=True).start()
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    host, port = inner.server_address[:2]
    found = Gate(bound, Rules(str(host), int(port), "inner", None, changed))
    found.open()
    Inner.may_end.clear()
    yield found
    Inner.may_end.set()
    inner.shutdown()
    inner.server_close()


def post(
    gate: Gate, path: str, body: str, *, version: int = 11
) -> tuple[http.client.HTTPResponse, Any]:
    """The answer and its JSON."""
    with closing(http.client.HTTPConnection(*gate.address, timeout=30)) as connection:
        connection._http_vsn, connection._http_vsn_str = version, f"HTTP/1.{version - 10}"
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer, json.loads(answer.read())


@pytest.mark.parametrize("version", [10, 11])
def test_an_answer_comes_back_as_it_is(gate: Gate, version: int) -> None:
    """Of unknown length: in pieces, or until the connection's end."""
    answer, told = post(gate, "/a?b", '{"x": 1}', version=version)
    assert (answer.status, answer.headers["x-own"]) == (418, "kept")
    assert answer.headers["access-control-allow-origin"] is None
    assert told == {"body": '{"x": 1, "more": "/a"}', "key": "Bearer inner"}


def test_a_body_that_is_not_an_object_is_left_to_the_server(gate: Gate) -> None:
    for body in ("", "{", "[1]", "[" * 100_000):
        assert post(gate, "/a", body)[1]["body"] == body
    refused, told = post(gate, "/a", '{"refused": 1}')
    assert (refused.status, told["error"]["message"]) == (400, "not this one")


def test_what_does_not_end_in_time_is_counted(gate: Gate) -> None:
    asking = threading.Thread(target=post, args=(gate, "/slow", "{}"), daemon=True)
    idle = http.client.HTTPConnection(*gate.address, timeout=30)
    idle.request("POST", "/a", "{}")
    idle.getresponse().read()
    asking.start()
    while not gate.num_in_flight:
        asking.join(0.01)
    assert gate.close(drain_s=0.2) == 1
    idle.request("POST", "/a", "{}")
    assert idle.getresponse().status == 503
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        post(gate, "/a", "{}")
    Inner.may_end.set()
    asking.join(30)
    assert gate.close(drain_s=10) == 0


def test_every_sampling_value_is_a_default_somewhere() -> None:
    """But those that say how often a row is computed, and what its server cannot do."""
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
        seed=2**40 + 5,
        ignore_eos=True,
        structured={"choice": ["x", "y"]},
    )
    assert server_sampling(sampling) == {
        "samplers": "penalties;temperature;min_p;top_k;top_p",
        "temp": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "penalty_last_n": -1,
        "penalty_repeat": 1.1,
        "penalty_freq": 0.3,
        "penalty_present": 0.2,
    }
    values = request_values(sampling)
    grammar = 'root ::= "x" | "y"'
    assert values == {"stop": ["a"], "seed": 5, "ignore_eos": True, "grammar": grammar}
    assert completed({"seed": 1, "stop": None}, values, SAID_BY) == {**values, "seed": 1}
    for said in ("response_format", "tools", "json_schema", "grammar"):
        assert completed({said: {}}, values, SAID_BY).get("grammar", {}) == {}, said
    with pytest.raises(ConfigError, match="stop_token_ids"):
        check_served(SamplingSettings(stop_token_ids=(5,)))


@pytest.mark.parametrize("regex", ["a/b", r"a\/b"])
def test_a_slash_in_a_pattern_does_not_end_it(regex: str) -> None:
    values = request_values(SamplingSettings(structured={"regex": regex}))
    assert values == {"grammar": "%llguidance {}\nstart: /a\\/b/\n"}


def test_forms_and_penalties_of_vllms_requests_are_said_in_llama_cpps_words() -> None:
    choice = translated({"structured_outputs": {"choice": ["yes", "no"], "regex": None}})
    assert choice == {"grammar": 'root ::= "yes" | "no"'}
    assert translated({"structured_outputs": {"json": '{"type": "object"}'}}) == {
        "json_schema": {"type": "object"}
    }
    assert translated({"structured_outputs": {"regex": "a/b"}})["grammar"].endswith("/a\\/b/\n")
    assert translated({"repetition_penalty": 1.5, "prompt": "x"}) == {
        "repeat_penalty": 1.5,
        "prompt": "x",
    }
    plain = {"prompt": "x", "echo": False, "stop_token_ids": [], "min_tokens": None, "top_k": 5}
    assert translated(plain) == plain


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"echo": True}, "echo: llama.cpp's server cannot do that"),
        ({"stop_token_ids": [5]}, "stop_token_ids: llama.cpp's server cannot"),
        ({"min_tokens": 3}, "min_tokens: "),
        ({"prompt_logprobs": 0}, "prompt_logprobs: "),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "must have one of json, regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "must have one of json, regex"),
        ({"structured_outputs": "x"}, "must have one of json, regex"),
        ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice is none: yes"),
        ({"structured_outputs": {"json": "["}}, "Expecting value"),
    ],
)
def test_what_llama_cpps_server_would_pass_over_is_refused(
    body: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        translated(body)
