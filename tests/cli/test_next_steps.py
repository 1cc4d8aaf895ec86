"""What somebody at a terminal may do next: commands that can be typed as they stand."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import pytest

from batchinfer.cli.app import cli
from batchinfer.cli.next_steps import (
    after_init,
    after_run,
    after_serve,
    after_show,
    after_try,
    say_next,
    while_serving,
)
from batchinfer.cli.source import JOB_OPTIONS, JobSource
from batchinfer.telemetry import Outcome

JOB = JobSource("my job.yaml", ())
(MODEL,) = (option for option in JOB_OPTIONS if option.key == "model.path")
(INPUT,) = (option for option in JOB_OPTIONS if option.key == "input.path")
(OUTPUT,) = (option for option in JOB_OPTIONS if option.key == "output.path")


class Stream(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def names(steps: Any) -> list[str]:
    return [step.split()[1] for step in steps]


@pytest.mark.parametrize("of", ["out", "err"])
def test_only_a_terminal_is_told(of: str) -> None:
    streams = {name: Stream(is_terminal=name != of) for name in ("out", "err")}
    say_next(streams["out"], streams["err"], {"a": "b"})
    assert streams["err"].getvalue() == ""


def test_each_step_has_a_line_and_says_what_it_does() -> None:
    out, err = Stream(is_terminal=True), Stream(is_terminal=True)
    say_next(out, err, {"one": "first", "three": "second"})
    lines = err.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
    assert lines == ["next: one    # first", "      three  # second"]
    assert out.getvalue() == ""


def test_every_command_is_one_that_there_is() -> None:
    complete = after_run(JOB, Outcome("complete", 0, "/out"), is_limited=False)
    begun = after_init("my job.yaml", generates=True)
    assert names(begun) == ["try", "run", "show", "run", "serve", "chat"]
    assert names(after_init("job.yaml", generates=False)) == ["run", "show", "run"]
    for step in [*begun, *after_try(JOB), *complete, *after_serve(JOB)]:
        program, name, job, *rest = shlex.split(step)
        assert (program, job) == ("batchinfer", "my job.yaml") and name in cli.list_commands(None)
        assert rest in ([], ["--limit", "20"])


def test_what_comes_after_a_run_depends_on_how_it_ended() -> None:
    def after(status: str, *, is_limited: bool = False, source: JobSource = JOB) -> list[str]:
        return list(after_run(source, Outcome(status, 0, "/out/a b"), is_limited=is_limited))

    assert names(after("complete")) == ["show", "serve", "chat"]
    scored = Outcome("complete", 0, "/out", count_names=("scored_tokens",))
    assert names(after_run(JOB, scored, is_limited=False)) == ["show"]
    assert names(after("partial", is_limited=True)) == ["show", "run"]
    assert names(after("partial")) == ["show"], "the other slices are others'"
    assert after("failed") == after("skipped") == []
    assert after("stopped") == ["the same command again"]
    direct = JobSource(None, (), ((INPUT, ("a.parquet", "b.parquet")), (MODEL, "m")))
    assert after("partial", is_limited=True, source=direct) == [
        "batchinfer show '/out/a b'",
        "batchinfer run --input a.parquet --input b.parquet --model m",
    ]
    elsewhere = JobSource("job.yaml", (), ((OUTPUT, "/out/a b"),))
    assert after("complete", source=elsewhere) == [
        "batchinfer show '/out/a b'",
        "batchinfer serve job.yaml --output '/out/a b'",
    ]
    changed = JobSource("job.yaml", ("sampling.seed=1",))
    assert after("complete", source=changed)[-1] == "batchinfer chat job.yaml --set sampling.seed=1"


def test_an_output_that_is_not_complete_goes_on(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    assert after_show(str(job), is_complete=False) == {}, "of an output it is not known whose"
    job.write_text("")
    assert names(after_show(str(job), is_complete=False)) == ["run"]
    assert names(after_show(str(job), is_complete=True)) == ["serve", "chat"]


def test_a_server_is_asked_as_its_model_and_its_key_have_it() -> None:
    url = "http://127.0.0.1:8000/v1"
    chat = " ".join(while_serving(url, chats=True, key_variable="KEY"))
    assert f"curl {url}/chat/completions" in chat and '"messages"' in chat
    assert '-H "authorization: Bearer $KEY"' in chat
    plain = " ".join(while_serving(url, chats=False, key_variable=None))
    assert f"curl {url}/completions" in plain and '"prompt"' in plain and "Bearer" not in plain
