"""`try` shows one prompt as it is sent and the completion as it comes, and writes nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.cli.tokens import Pieces
from batchinfer.config import SamplingSettings, load_job
from batchinfer.engine.base import Answer, Request
from batchinfer.engine.demands.completion import Completion, CompletionDemand
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.runner.one_prompt import find_row, with_text
from batchinfer.runner.stream import Stream
from batchinfer.tasks.generate import CompletionAsk
from batchinfer.testing import FakeEngine, FakePlan, LightTokenizer
from tests.support.jobs import MODEL, Place, job, results, rows, run, start, wait, write_job

TRY = {"command": ("try",)}


SCORE = [
    *("--set", "task=score"),
    *("--set", 'sampling={"max_tokens": 256, "logprobs": null, "seed": null, "temperature": 0.0}'),
]


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    frame = rows(3).with_columns(text=pl.Series(["one <|im_end|> row", None, "third row"]))
    folder.write_parquet("in/s0.parquet", frame)
    folder.write_parquet("in/s1.parquet", rows(2, start=3))
    return write_job(tmp_path, job(folder, sampling={"temperature": 1.0, "seed": 5}))


def test_it_shows_a_rows_own_settings_and_samples_by_them(folder: Place, tmp_path: Path) -> None:
    frame = rows(2).with_columns(limit=pl.Series([None, 700]), heat=pl.Series([None, 1.0]))
    folder.write_parquet("in/s0.parquet", frame)
    per_row = {"max_tokens": "limit", "temperature": "heat"}
    settings = job(folder, sampling={"seed": 5, "per_row": per_row})
    path = write_job(tmp_path, settings)
    shown = run(path, "--row", "1", **TRY)
    assert shown.stdout.startswith(
        "row      s0.parquet:1\n         max_tokens from column limit: 700\n"
        "         temperature from column heat: 1.0\nprompt   "
    ), shown.stdout + shown.stderr
    assert "tokens of 1,348 that fit" in shown.stdout
    assert run(path).code == 0
    length = results(folder)["num_completion_tokens"][1]
    assert length > 16 and f"{length} tokens in " in shown.stdout
    assert "limit: null: the job's own" in run(path, **TRY).stdout
    talked = run(path, "--prompt", "no row", **TRY)
    assert (talked.code, "column" in talked.stdout) == (0, False)


def test_it_shows_what_a_run_computes_for_the_row(path: Path, folder: Place) -> None:
    """With the row's seed; special tokens are marked, and no output appears."""
    shown = run(path, "--row", "4", **TRY)
    assert shown.code == 0 and not folder.names("out")
    prompt, _, answer = shown.stdout.partition("\nanswer\n")
    assert prompt.splitlines()[0] == "row      s1.parquet:1"
    assert "prompt   8 tokens of 2,032 that fit\n4 word word" in prompt
    assert run(path).code == 3  # the null
    (row,) = results(folder).filter(shard="s1.parquet", row=1).to_dicts()
    text, _, rest = answer.rstrip("\n").rpartition("\n")
    assert text.replace("⟦<|im_end|>⟧", "") == row["completion"]
    assert f"{row['num_completion_tokens']} tokens in " in rest
    assert "the model ended it" in rest or "cut at sampling.max_tokens" in rest


def test_tokens_come_one_by_one_with_their_probabilities(path: Path) -> None:
    """Without colours as a list; a text in place of a row needs no input."""
    options = (
        "--model",
        str(MODEL),
        "--prompt",
        "a<|im_end|>b",
        "--set",
        "prompt.template={{ x }}",
    )
    shown = run(*options, "--logprobs", "--set", "sampling.max_tokens=4", **TRY)
    assert shown.code == 0, shown.stderr
    assert "prompt   3 tokens of 2,044 that fit\na⟦<|im_end|>⟧b\n" in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if line[:2] in ("0.", "1.")]
    assert f"{len(lines)} tokens in " in shown.stdout and 0.0 < float(lines[0].split()[0]) <= 1.0


@pytest.mark.parametrize("is_variable", [False, True])
def test_settings_of_chats_hold_for_a_text_without_a_job_file(is_variable: bool) -> None:
    """Which says nothing of what a prompt is made of."""
    text = "{{ messages[-1].role }}: {{ messages[-1].content }}"
    options, environ = ["--set", f"prompt.chat_template={text}"], {}
    if is_variable:
        options, environ = [], {"BATCHINFER__PROMPT__CHAT_TEMPLATE": text}
    plain = ("--model", str(MODEL), "--prompt", "a", "--set", "sampling.max_tokens=4")
    shown = run(*plain, *options, environ=environ, **TRY)
    assert shown.code == 0, shown.stderr
    assert "fit\nuser: a\n" in shown.stdout
    cut = run(*plain, "--set", "prompt.on_too_long=truncate_left", **TRY)
    assert cut.code == 0, cut.stderr
    assert cut.stdout.partition("answer")[0] == run(*plain, **TRY).stdout.partition("answer")[0]


def test_a_signal_ends_the_answer(path: Path) -> None:
    master, slave = pty.openpty()
    process = start(
        path, "--set", "sampling.max_tokens=2000", fake={"step_s": 0.05}, stdout=slave, **TRY
    )
    shown = b""
    while not re.search(rb"answer\s*\w", re.sub(rb"\x1b\[[\d;]*m", b"", shown)):
        shown += os.read(master, 4096)
    os.kill(process.pid, signal.SIGINT)
    ended = wait(process)
    assert ended.code == 130
    assert "received SIGINT: the answer was abandoned" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--row", "5"], "--row 5: the input has 5 rows, counted from 0"),
        (["--row", "s1.parquet:2"], "s1.parquet has 2 rows, counted from 0"),
        (["--row", "s2.parquet:0"], "there is no shard s2.parquet; the first of 2 is s0.parquet"),
        (["--row", "x"], "must be a number from 0, or SHARD:NUMBER"),
        (["--row", "1"], "row s0.parquet:1: missing_value: column 'text' is null"),
        (["--row", "1", "--prompt", "x"], "give --row or --prompt, not both"),
        (["--set", "input.filter=id = 'x'"], "no row passes input.filter"),
        (["--set", "prompt.template={{ nope }}"], "prompt.template uses 'nope', which is not an"),
        (["--set", "model.path=nowhere"], "model.path: there is no folder"),
        (SCORE, "try shows a completion, and task: score generates none"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_a_model_loads(
    path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr("batchinfer.prompt.encode._load", lambda path, **_: LightTokenizer(path))
    monkeypatch.setattr("batchinfer.engine.vllm.kind.VllmKind.prepare", lambda *_: None)
    ended = CliRunner().invoke(cli, ["try", str(path), *arguments])
    assert ended.exit_code != 0
    assert sentence in str(ended.exception) + ended.output


def test_the_first_row_is_the_first_that_passes_the_filter(path: Path) -> None:
    tried = load_job(path, ["input.filter=id = 'row-3'"]).job
    first = find_row(tried, None, ["text"])
    assert (str(first), first.is_left_out) == ("s1.parquet:0", False)
    asked = find_row(tried, "2", ["text"])
    assert (str(asked), asked.is_left_out) == ("s0.parquet:2", True)
    assert asked.table.to_pylist() == [{"text": "third row"}]
    assert str(find_row(tried, "s1.parquet:1", ["text"])) == "s1.parquet:1"


def test_a_text_takes_the_place_of_what_the_user_says(path: Path) -> None:
    """What the system says stays, unless it depends on the row; no template is made of the text."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "This is {{ id }}."},
        {"role": "user", "content": "{{ text }}"},
    ]
    sets = ["prompt=" + json.dumps({"template": None, "messages": messages})]
    tried, row = with_text(load_job(path, sets).job, "{{ 1 }}", is_chat=True)
    assert tried.prompt.messages_column == "prompt"
    (text,) = row.table["prompt"].to_pylist()
    assert json.loads(text) == [messages[0], {"role": "user", "content": "{{ 1 }}"}]
    tried, row = with_text(tried, "{{ 1 }}", is_chat=False)
    assert (tried.prompt.column, row.table["prompt"].to_pylist()) == ("prompt", ["{{ 1 }}"])


def completion(token_ids: list[int], **fields: Any) -> Completion:
    return Completion(0, np.array(token_ids, np.int32), len(token_ids), **fields)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> TokenEncoder:
    monkeypatch.setattr("batchinfer.prompt.encode._load", lambda path, **_: LightTokenizer(path))
    return TokenEncoder(str(MODEL))


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(encoder: TokenEncoder) -> None:
    (ids,) = encoder.encode(["a 漢 b<|im_end|>"], add_special_tokens=False)
    pieces = Pieces(encoder)
    shown = [p for n in range(len(ids)) for p in pieces.of(completion(ids[: n + 1].tolist()))]
    assert [p.token_id for p in shown] == ids.tolist()
    assert "".join(p.text for p in shown) == "a 漢 b<|im_end|>"
    assert [p.is_special for p in shown] == [False] * (len(ids) - 1) + [True]
    assert "" in [p.text for p in shown]
    assert pieces.rest("a 漢 b\ufffd") == "\ufffd"


def test_a_stop_text_is_not_shown(encoder: TokenEncoder) -> None:
    (ids,) = encoder.encode(["one STOP"], add_special_tokens=False)
    pieces = Pieces(encoder)
    shown = pieces.of(completion(ids.tolist(), text="one "))
    assert "".join(p.text for p in shown) + pieces.rest("one ") == "one "


class Plain:
    """An engine that does not stream: as much of one as is asked."""

    def __init__(self) -> None:
        self._engine = FakeEngine(
            FakePlan(),
            CompletionDemand("generate", SamplingSettings(max_tokens=9, logprobs=0)),
            max_model_len=64,
        )

    def add(self, request: Request) -> None:
        self._engine.add(request)

    def step(self) -> list[Answer]:
        return self._engine.step()


ASK = CompletionAsk(np.array([3, 4, 5], np.int32))


def test_an_engine_that_does_not_stream_gives_the_whole() -> None:
    streamed = [*Stream(Plain()._engine, ASK, 0, lambda: False)]
    (whole,) = Stream(Plain(), ASK, 0, lambda: False)
    assert len(streamed) == len(whole.token_ids) > 1
    assert [len(c.token_ids) for c in streamed] == list(range(1, len(streamed) + 1))
    assert streamed[-1].token_ids.tolist() == whole.token_ids.tolist()


def test_an_answer_that_is_stopped_leaves_nothing_in_the_engine() -> None:
    engine = Plain()._engine
    asked = iter([False, False, True])
    assert len([*Stream(engine, ASK, 0, lambda: next(asked))]) == 2
    assert engine.num_tokens_in_flight() == 0 and engine.step() == []
