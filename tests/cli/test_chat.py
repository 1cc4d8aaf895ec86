"""`chat`, from its first line to its end, on the fake engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast
from unittest.mock import MagicMock

import pytest

from batchinfer.cli.chat import Repl, source_of_target
from batchinfer.cli.quiet_engine import Quiet
from tests.support.jobs import MODEL, ROOT


def read_to(stream: IO[str], end: str) -> str:
    """Up to and with `end`."""
    text = ""
    while not text.endswith(end):
        character = stream.read(1)
        assert character, f"ended before {end!r}: {text}"
        text += character
    return text


@pytest.fixture
def chat() -> Iterator[subprocess.Popen[str]]:
    """One with the demo model's tokenizer, whose answers take some time."""
    variables = {"FAKE_REAL_TOKENIZER": "1", "FAKE_ENGINE": json.dumps({"step_s": 0.01})}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_run", "chat", str(MODEL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=ROOT,
        env=os.environ | variables,
    )
    with process:
        yield process
        process.kill()


@pytest.mark.slow
def test_a_conversation_is_answered_changed_and_interrupted(chat: subprocess.Popen[str]) -> None:
    """Ctrl-C stops an answer and not the program, which ends where the input does."""
    assert chat.stdin is not None and chat.stdout is not None

    def say(lines: str) -> str:
        chat.stdin.write(f"{lines}\n")
        return read_to(chat.stdout, "\n> ")

    shown = read_to(chat.stdout, "> ")
    assert f"{MODEL}: float32" in shown and "/help lists commands" in shown
    assert "tokens/s" in say("hello") and "of 2,048 tokens of context" in say("again")
    refusal = "/set temperatur: unknown key; did you mean sampling.temperature?"
    assert refusal in say("/set temperatur=1")
    assert "/set KEY=VALUE" in say("/what")
    for key in ("input.path", "per_row", "prompt.column", "sampling.n"):
        assert f"/set {key}: it has no effect on a chat" in say(f"/set {key}=x")
    assert "prompt_too_long" in say("/set max_tokens=2000\nlong")
    chat.stdin.write("/clear\nlong\n")
    chat.stdout.read(30)  # of the answer
    chat.send_signal(signal.SIGINT)
    assert "; stopped; " in read_to(chat.stdout, "\n> ")
    assert "sampling.max_tokens=2000" in say("/set")
    stdout, stderr = chat.communicate("/clear\n", timeout=60)
    assert chat.returncode == 0, stderr
    assert "Traceback" not in stdout + stderr


class Ended:
    """A talk in which everything fails."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise AttributeError(f"no {name}\x1b[2J")

        return fail


@pytest.mark.parametrize("line", ["/clear", f"/set model.path={MODEL}", "hello"])
def test_an_error_of_the_program_does_not_end_a_conversation(
    monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """It is told as what it is, and the next line is read."""
    out, err, lines = StringIO(), StringIO(), [line, "/quit"]
    stdio = SimpleNamespace(out=out, err=err, given_back=nullcontext)
    monkeypatch.setattr("builtins.input", lambda _: lines.pop(0))
    quiet = SimpleNamespace(stdio=stdio, watchdog=SimpleNamespace(leave=lambda *_: None))
    talk: Any = Ended()
    talk.engine, talk.spec = MagicMock(), MagicMock()
    talk.spec.model.max_model_len = talk.engine.facts.max_model_len = 8
    Repl(talk, source_of_target(str(MODEL), ()), cast("Quiet", quiet)).run()
    assert not lines
    assert "internal error: AttributeError: no " in out.getvalue()
    assert "\x1b" not in out.getvalue() and "Traceback" in err.getvalue()


@pytest.mark.parametrize(
    ("target", "path"), [("jobs/x.yaml", "jobs/x.yaml"), ("models/x", None), ("org/name", None)]
)
def test_a_target_is_a_job_file_or_a_model(target: str, path: str | None) -> None:
    source = source_of_target(target, ())
    assert source.path == path
    assert [value for _, value in source.given] == ([] if path else [target])


def test_a_model_that_is_not_there_is_refused_as_in_a_run(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "batchinfer", "chat", "nowhere"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )
    assert ended.returncode == 2
    assert f"error: model.path: there is no folder {tmp_path / 'nowhere'}" in ended.stderr
    assert "relative paths start at the current directory" in ended.stderr
    assert "the output of the engine" not in ended.stderr  # there was no engine
    assert not list(tmp_path.iterdir())
