"""The demo model behind vLLM's own server, asked by OpenAI's own client."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from batchinfer.config import Job
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.encode import TokenEncoder
from tests.support.adapters import write_adapter
from tests.support.jobs import MODEL, Place, Process, job, kill, start, wait, wait_until, write_job

pytestmark = [
    pytest.mark.real_engine,
    pytest.mark.xdist_group("serve"),  # one worker: the server is for the module
]

KEY = "sk-demo"
QUESTION = "Summarize this software package in one line.\n\n"
DESCRIPTION = "This package contains an editor for text files with syntax highlighting."
CHAT: Any = [{"role": "user", "content": QUESTION + DESCRIPTION}]
#: How the job samples; the end-of-text token is rare enough in 24 tokens of noise.
SAMPLING = {"max_tokens": 24, "temperature": 1.0, "top_k": 5, "seed": 7, "stop": ["qqq"]}
#: Its text is taken as it is: letters, escapes and all.
PROMPT = {
    "messages": [{"role": "user", "content": "{{ text }}"}],
    "chat_template": r"{% for m in messages %}«{{ m.content }}»{{ '\\n ' + how }}{% endfor %}" "\n",
    "chat_template_kwargs": {"how": "politely\n"},
}


class Served:
    """A server that answers, and its process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line + process.communicate()[1]
        self.url = line.split()[-1]
        self.client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=120)

    def end(self) -> None:
        """Whatever became of it."""
        self.client.close()
        kill(self.process)
        self.process.communicate()


def parsed() -> Job:
    return Job.model_validate(job(Place("/nothing"), sampling=SAMPLING, prompt=PROMPT))


def served(folder: Path, **sections: Any) -> Served:
    settings = job(Place(str(folder / "nothing")), **sections)
    path = write_job(folder, settings)
    return Served(
        start(
            *(path, "--port", "0", "--api-key-env", "THE_KEY"),
            command=("serve",),
            engine="real",
            spares=(1, 1),  # the server, and vLLM's core
            environ={"THE_KEY": KEY, "VLLM_API_KEY": "another", "TMPDIR": str(folder)},
        )
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = served(tmp_path_factory.mktemp("serve"), sampling=SAMPLING, prompt=PROMPT)
    yield running
    running.end()


def must_sample_as_the_job(server: Served) -> None:
    """The job's seed makes it repeatable; another seed, given by the request, another answer."""
    assert [model.id for model in server.client.models.list()] == ["test"]

    def answer(**more: Any) -> Any:
        return server.client.chat.completions.create(model="test", messages=CHAT, **more)

    first = answer()
    assert 0 < first.usage.completion_tokens <= 24 and first.choices[0].message.content
    assert answer().choices[0].message == first.choices[0].message
    others = {answer(seed=seed).choices[0].message.content for seed in (1, 2, 3)}
    assert others != {first.choices[0].message.content}


def must_let_a_request_override(server: Served) -> None:
    """Upwards, too: the job's max_tokens is a default and no cap."""

    def tokens(**more: Any) -> int:
        usage = server.client.completions.create(
            model="test", prompt=DESCRIPTION, extra_body={"ignore_eos": True}, **more
        ).usage
        assert usage is not None
        return usage.completion_tokens

    assert (tokens(), tokens(max_tokens=100), tokens(max_tokens=5)) == (24, 100, 5)
    answers = {
        server.client.completions.create(model="test", prompt=DESCRIPTION, temperature=0, seed=seed)
        .choices[0]
        .text
        for seed in (1, 2)
    }
    assert len(answers) == 1, "greedy"


def test_a_chat_is_answered_as_the_job_samples(server: Served) -> None:
    must_sample_as_the_job(server)


def test_a_request_overrides_what_the_job_says(server: Served) -> None:
    must_let_a_request_override(server)


def test_a_chat_becomes_the_prompt_of_a_row(server: Served) -> None:
    """By the job's chat template, with its arguments, and not by the tokenizer's own."""
    prompt = parsed().prompt
    encoder = TokenEncoder(str(MODEL))
    template = ChatTemplate(encoder.tokenizer, prompt.chat_template, prompt.chat_template_kwargs)
    text = template.render(CHAT)
    assert text == f"«{QUESTION}{DESCRIPTION}»\\n politely\n"
    found = httpx.post(
        server.url.replace("/v1", "/tokenize"),
        json={"model": "test", "messages": CHAT},
        headers={"authorization": f"Bearer {KEY}"},
    ).json()
    assert found["tokens"] == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_stream_brings_the_same_text_in_pieces(server: Served) -> None:
    whole = server.client.chat.completions.create(model="test", messages=CHAT)
    stream = server.client.chat.completions.create(
        model="test", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = stream
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 3
    assert last.usage == whole.usage
    of_completions = server.client.completions.create(
        model="test", prompt=DESCRIPTION, stream=True, max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert sum(len(piece.choices) for piece in of_completions) == 9


def test_a_schema_is_kept_to(server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["tool", "library"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    answer = server.client.chat.completions.create(
        model="test",
        messages=CHAT,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
    )
    assert json.loads(answer.choices[0].message.content or "")["kind"] in ("tool", "library")


def test_what_cannot_be_answered_is_the_clients_error(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        server.client.completions.create(model="test", prompt="word " * 10_000)
    with pytest.raises(openai.NotFoundError, match="other"):
        server.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model="test", prompt="x", temperature=-1)
    assert server.client.completions.create(model="test", prompt="x").choices


def test_nothing_but_health_is_open_without_the_key(server: Served) -> None:
    """vLLM's own key leaves the same model open at /invocations."""
    root = server.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/docs", "/version", "/ping", "/tokenize"):
        assert httpx.get(root + path).status_code == 401, path
    for path in ("/v1/completions", "/invocations", "/tokenize", "/v1/messages"):
        body = {"model": "test", "prompt": "x"}
        assert httpx.post(root + path, json=body).status_code == 401, path
    assert (
        httpx.get(f"{root}/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    )
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()


def test_sigterm_lets_a_stream_end(server: Served) -> None:
    """And takes nothing new meanwhile. It stops the module's server, so it is the last one."""
    finish_reasons: list[str | None] = []
    has_begun = threading.Event()

    def ask() -> None:
        stream = server.client.chat.completions.create(
            model="test",
            messages=CHAT,
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for piece in stream:
            finish_reasons.append(piece.choices[0].finish_reason)
            has_begun.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert has_begun.wait(60)
    kill(server.process, signal.SIGTERM)
    wait_until(lambda: is_refused(server.url), what="the end of listening")
    asking.join(60)
    assert len(finish_reasons) > 150 and finish_reasons[-1] == "length"
    ended = wait(server.process, 60)
    assert ended.code == 143, ended.stderr
    assert ended.result["message"] == "received SIGTERM"


def is_refused(url: str) -> bool:
    try:
        httpx.get(f"{url.removesuffix('/v1')}/health", timeout=60)
    except httpx.ConnectError:
        return True
    except httpx.ReadError:  # it was waiting to be taken as the socket was closed
        return False
    return False


def test_an_adapter_has_the_jobs_name_and_the_engines_death_an_exit_code(tmp_path: Path) -> None:
    """All in one, as each start takes seconds; the job's form of an answer, too. The engine is
    killed as the kernel would do it.
    """
    adapter = write_adapter(tmp_path / "adapter", scale=0.5)
    running = served(
        tmp_path,
        model={"lora": str(adapter)},
        sampling={"max_tokens": 40, "structured": {"regex": "[a-z]{9} [a-z]{9}"}},
    )
    try:
        names = [model.id for model in running.client.models.list()]
        assert names == ["model", "test"]
        answers = {
            name: running.client.completions.create(model=name, prompt=DESCRIPTION).choices[0].text
            for name in names
        }
        assert answers["model"] != answers["test"]
        assert all(re.fullmatch("[a-z]{9} [a-z]{9}", answer) for answer in answers.values())
        engine = max(descendants(running.process.pid), key=resident_bytes)
        os.kill(engine, signal.SIGKILL)
        ended = wait(running.process, 120)
    finally:
        running.end()
    assert ended.code == 75, ended.stderr
    assert "a process of the vLLM engine died" in ended.result["message"]


def test_a_failure_while_the_engine_loads_is_reported_as_by_a_run(tmp_path: Path) -> None:
    """It fails in a process below the server's, which says to the server only that it did."""
    settings = job(
        Place(str(tmp_path / "nothing")),
        engine={"options": {"kv_cache_memory_bytes": 1000}},
    )
    path = write_job(tmp_path, settings)
    ended = wait(start(path, "--port", "0", command=("serve",), engine="real", spares=(1, 1)), 250)
    assert ended.code == 2, ended.stderr
    message = ended.result["message"]
    assert "does not fit the device's memory: it needs about" in message
    assert "engine.options.kv_cache_memory_bytes" in message
    assert "(vLLM, while sizing the KV cache: " in message


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
