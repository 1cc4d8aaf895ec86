"""The demo model as GGUF behind llama.cpp's own server, asked by OpenAI's own client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.end_to_end.test_serve import (
    CHAT,
    DESCRIPTION,
    KEY,
    Served,
    is_refused,
    must_let_a_request_override,
    must_sample_as_the_job,
)
from tests.support.gguf import complete, running
from tests.support.jobs import Place, job, kill, start, wait, wait_until, write_job

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve_llama_cpp")]

#: The end-of-text token is rare enough in 24 tokens of noise.
SAMPLING = {"max_tokens": 24, "temperature": 1.0, "top_k": 5, "seed": 7, "stop": ["qqq"]}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["tool", "library"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def write(folder: Path, file: Path, **sections: Any) -> Path:
    settings = job(
        Place(str(folder / "nothing")),
        **{"engine": {"name": "llama_cpp"}, "model": {"path": str(file)}, **sections},
    )
    return write_job(folder, settings)


def served(folder: Path, file: Path, **sections: Any) -> Served:
    environ = {"THE_KEY": KEY, "TMPDIR": str(folder)}
    arguments = (write(folder, file, **sections), "--port", "0", "--api-key-env", "THE_KEY")
    return Served(
        start(*arguments, command=("serve",), engine="real", spares=(1,), environ=environ)
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_gguf: Path) -> Iterator[Served]:
    running = served(tmp_path_factory.mktemp("serve"), demo_gguf, sampling=SAMPLING)
    yield running
    running.end()


def chat(server: Served, **more: Any) -> Any:
    return server.client.chat.completions.create(model="test", messages=CHAT, **more)


def text(server: Served, **more: Any) -> str:
    answer = server.client.completions.create(model="test", prompt=DESCRIPTION, **more)
    return str(answer.choices[0].text)


def test_a_chat_is_answered_as_the_job_samples(server: Served) -> None:
    must_sample_as_the_job(server)


def test_a_request_overrides_what_the_job_says(server: Served) -> None:
    must_let_a_request_override(server)


def test_a_greedy_chat_gets_what_a_row_gets(server: Served, demo_gguf: Path) -> None:
    """The same prompt by the file's own template, and the same tokens."""
    answer = chat(server, temperature=0, stop=["\n"], logprobs=True, max_tokens=12)
    tokens = answer.choices[0].logprobs.content
    of_server = [token.model_extra["id"] for token in tokens]
    with running(demo_gguf, sampling={"max_tokens": 12}) as llama:
        vocabulary = llama._vocabulary
        rendered = f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        (row,) = complete(llama, vocabulary.tokenize(rendered, add_special=False).tolist())
    assert row.token_ids[: len(of_server)].tolist() == of_server and len(of_server) > 3


def test_a_stream_brings_the_same_text_in_pieces(server: Served) -> None:
    whole = chat(server, temperature=0)
    stream = chat(server, temperature=0, stream=True, stream_options={"include_usage": True})
    *pieces, last = stream
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 3
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_schema_is_kept_to_and_one_that_cannot_be_is_refused(server: Served) -> None:
    """llama.cpp's own server would answer the latter without it."""

    def form(schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}

    answer = chat(server, response_format=form(SCHEMA), max_tokens=200)
    assert json.loads(answer.choices[0].message.content)["kind"] in ("tool", "library")
    one_of = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert text(server, extra_body=one_of) in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="echo: llama"):
        text(server, extra_body={"echo": True})
    behind = {"type": "string", "pattern": "(?<=a)b"}
    with pytest.raises(openai.BadRequestError, match="cannot read the JSON schema"):
        chat(server, response_format=form(behind))


def test_what_cannot_be_answered_is_the_clients_error(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context size"):
        text(server, extra_body={"prompt": "word " * 10_000})
    root = server.url.removesuffix("/v1")
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{root}/v1/completions", content=b"{", headers=headers).status_code >= 400
    chunks = httpx.post(f"{root}/v1/completions", content=iter([b"{}"]), headers=headers)
    assert chunks.status_code == 411
    assert text(server, extra_body={"ignore_eos": True})


def test_nothing_but_health_is_open_without_the_key(server: Served) -> None:
    """llama.cpp's own server has a list of paths that are open."""
    root = server.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    for path in ("/", "/v1/models", "/models", "/metrics", "/props", "/slots", "/v1/health"):
        assert httpx.get(root + path).status_code == 401, path
    for path in ("/v1/completions", "/completion", "/tokenize", "/v1/messages"):
        assert httpx.post(root + path, json={"prompt": "x"}).status_code == 401, path
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{root}/metrics", headers=headers).text.startswith("# HELP")
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    assert not open_without_key(server), "the port behind the gate has a key of its own"


def open_without_key(server: Served) -> list[int]:
    """Ports of the server's process, but the gate's, at which it answers anybody."""
    own = int(server.url.rpartition(":")[2].removesuffix("/v1"))
    files = Path(f"/proc/{child_of(server)}/fd").iterdir()
    sockets = {re.sub(r"\D", "", str(file.readlink())) for file in files}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    listening = [line[1] for line in lines if line[3] == "0A" and line[9] in sockets]
    ports = {int(address.partition(":")[2], 16) for address in listening}
    assert own in ports and len(ports) == 2
    body = {"prompt": "x", "model": "test", "max_tokens": 1}
    return [
        port
        for port in ports - {own}
        if httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code == 200
    ]


def child_of(server: Served) -> int:
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_a_client_that_leaves_a_stream_frees_its_place(server: Served) -> None:
    """llama.cpp computes what is not streamed to its end, read or not."""
    asked = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    begun_s = time.monotonic()
    text(server, max_tokens=900, extra_body={"ignore_eos": True})
    whole_s = time.monotonic() - begun_s
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
            % (KEY.encode(), len(body), body)
        )
        wait_until(lambda: num_running(server) == 1, what="a request that runs")
    begun_s = time.monotonic()
    wait_until(lambda: num_running(server) == 0, what="its end")
    assert time.monotonic() - begun_s < whole_s / 2


def num_running(server: Served) -> int:
    root = server.url.removesuffix("/v1")
    answer = httpx.get(f"{root}/metrics", headers={"authorization": f"Bearer {KEY}"})
    (line,) = re.findall(r"^llamacpp:requests_processing (\d+)", answer.text, re.M)
    return int(line)


def test_sigterm_lets_a_stream_end(server: Served) -> None:
    """And takes nothing new meanwhile. It stops the module's server, so it is the last one."""
    reasons: list[str | None] = []
    has_begun = threading.Event()

    def ask() -> None:
        stream = chat(server, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        for piece in stream:
            reasons.append(piece.choices[0].finish_reason)
            has_begun.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert has_begun.wait(60)
    kill(server.process, signal.SIGTERM)
    wait_until(lambda: is_refused(server.url), what="the end of listening")
    asking.join(60)
    assert len(reasons) > 300 and reasons[-1] == "length"
    ended = wait(server.process, 60)
    assert ended.code == 143, ended.stderr
    assert ended.result["message"] == "received SIGTERM"


def test_the_jobs_form_is_every_answers_and_the_servers_death_has_an_exit_code(
    tmp_path: Path, demo_gguf: Path
) -> None:
    form = {"max_tokens": 40, "structured": {"regex": "[a-z]{4}/[a-z]{4}"}}
    running = served(tmp_path, demo_gguf, sampling=form)
    try:
        answers = [text(running, temperature=1, seed=seed) for seed in range(3)]
        assert all(re.fullmatch("[a-z]{4}/[a-z]{4}", answer) for answer in answers)
        assert json.loads(text(running, extra_body={"json_schema": SCHEMA, "max_tokens": 99}))
        os.kill(child_of(running), signal.SIGKILL)
        ended = wait(running.process, 60)
    finally:
        running.end()
    assert ended.code == 75, ended.stderr
    assert "the server's process is gone (ended by SIGKILL)" in ended.result["message"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"sampling": {"stop_token_ids": [5]}}, "sampling.stop_token_ids: llama.cpp's server"),
        ({"sampling": {"structured": {"grammar": "root ::= nothing"}}}, "failed to parse grammar"),
        ({"sampling": {"structured": {"regex": "(?<=a)b"}}}, "(?<= is a look-around"),
    ],
)
def test_what_its_server_cannot_do_is_refused_before_it_answers(
    tmp_path: Path, demo_gguf: Path, sections: dict[str, Any], words: str
) -> None:
    path = write(tmp_path, demo_gguf, **sections)
    ended = wait(start(path, "--port", "0", command=("serve",), engine="real", spares=(1,)), 60)
    assert ended.code == 2, ended.stderr
    assert words in ended.result["message"]
