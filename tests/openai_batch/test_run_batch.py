"""OpenAI batch files on the fake engine: each line is answered once, or an error says why not."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import ConfigError, InputError
from batchinfer.openai_batch import batch
from batchinfer.openai_batch.answers import Answers
from batchinfer.openai_batch.batch import BatchFiles
from batchinfer.openai_batch.lines import opened, read_lines
from tests.support.adapters import write_adapter
from tests.support.jobs import MODEL, Ended, kill, run, start, wait, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
COMMAND = {"command": ("run-batch", "-i")}
FOLDER = "out.jsonl.batchinfer"


def chat(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return request(custom_id, CHAT, {"messages": messages, "max_tokens": 8} | body)


def request(custom_id: str, url: str, body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def options(folder: Path, *more: str) -> list[str]:
    return ["-o", str(folder / "out.jsonl"), "--model", str(MODEL), *more]


def answer(path: Path, *more: str, **launch: Any) -> Ended:
    return run(path, *options(path.parent, *more), **COMMAND, **launch)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def choices(folder: Path) -> dict[str, list[dict[str, Any]]]:
    lines = read(folder / "out.jsonl")
    return {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}


def errors(folder: Path) -> dict[int, tuple[str | None, str]]:
    """Line -> (key, message)."""
    found = {}
    for line in read(folder / "out.errors.jsonl"):
        error = line["response"]["body"]["error"]
        assert line["response"]["status_code"] in (400, 404)
        assert error["message"] == line["error"]["message"]
        found[line["error"]["line"]] = (error["param"], error["message"])
    return found


def test_answers_have_openais_shape_and_the_order_of_the_lines(tmp_path: Path) -> None:
    """Choices of n, of several prompts and of token ids; ids are the same when written again."""
    path = write(
        tmp_path / "in.jsonl",
        chat("z", model=str(MODEL)),
        request("b", COMPLETIONS, {"prompt": ["one", "two words"], "n": 2, "max_tokens": 8}),
        "",
        request("a", COMPLETIONS, {"prompt": [5, 6, 7], "return_token_ids": True, "logprobs": 2}),
        chat("c", logprobs=True, top_logprobs=1, temperature=0, n=2),
    )
    ended = answer(path)
    assert ended.code == 0, ended.stderr
    assert not (tmp_path / "out.errors.jsonl").exists()
    lines = read(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in lines] == ["z", "b", "a", "c"]
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    first = lines[0]["response"]
    assert (first["status_code"], lines[0]["error"]) == (200, None)
    body = first["body"]
    assert (body["object"], body["model"]) == ("chat.completion", str(MODEL))
    message = body["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    found = choices(tmp_path)
    assert [choice["index"] for choice in found["b"]] == [0, 1, 2, 3]
    assert found["a"][0]["token_ids"] and found["a"][0]["logprobs"]["top_logprobs"][0]
    assert lines[2]["response"]["body"]["usage"]["prompt_tokens"] == 3
    content = found["c"][0]["logprobs"]["content"]
    assert len(content[0]["top_logprobs"]) == 1 and content[0]["logprob"] <= 0
    assert found["c"][0]["message"] == found["c"][1]["message"]  # greedy: the same
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    again = answer(path)
    assert (again.code, again.result["rows_computed"]) == (0, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_each_line_is_sampled_as_its_body_says(tmp_path: Path) -> None:
    """The fake's length and tokens depend on prompt and seed, and on `max_tokens`."""
    path = write(
        tmp_path / "in.jsonl",
        chat("short", max_tokens=2),
        chat("long", max_tokens=None, max_completion_tokens=300),
        chat("seed 3", seed=3, temperature=1),
        chat("seed -3", seed=-3, temperature=1),
        chat("seed 3 again", seed=3, temperature=1),
        chat("default", max_tokens=None),
    )
    assert answer(path).code == 0
    usage = {
        line["custom_id"]: line["response"]["body"]["usage"]["completion_tokens"]
        for line in read(tmp_path / "out.jsonl")
    }
    assert usage["short"] <= 2 and 8 < usage["long"] <= 300
    assert usage["default"] > 16  # as long as the context has room
    found = choices(tmp_path)
    assert found["seed 3"] == found["seed 3 again"] != found["seed -3"]


def test_what_cannot_be_answered_is_an_error_of_its_line_and_said_at_the_end(
    tmp_path: Path,
) -> None:
    url = {"custom_id": "u", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}
    path = write(
        tmp_path / "in.jsonl",
        chat("a"),
        "{not json",
        chat("a"),
        url,
        {"method": "POST", "url": CHAT, "body": {}},
        {"custom_id": "get", "method": "GET", "url": CHAT, "body": {}},
        {"custom_id": "no url", "method": "POST", "body": {}},
        chat("model", model="gpt-4o"),
        chat("hot", temperature=3),
        chat("tools", tools=[{"type": "function"}]),
        chat("unknown", frequency=1),
        request("no messages", CHAT, {}),
        request("role", CHAT, {"messages": [{"content": "x"}]}),
        chat(
            "schema",
            response_format={"type": "json_schema", "json_schema": {"schema": {"type": 1}}},
        ),
        chat("long", text="word " * 3000),
        request("prompt", COMPLETIONS, {"prompt": {"a": 1}}),
        '["a list"]',
        request("token", COMPLETIONS, {"prompt": [999_999]}),
        chat("b"),
    )
    ended = answer(path)
    assert ended.code == 0, ended.stderr
    assert list(choices(tmp_path)) == ["a", "b"]
    found = errors(tmp_path)
    told = {number: f"{param}: {message}" for number, (param, message) in found.items()}
    expected = {
        2: "None: the line is not valid JSON",
        3: "custom_id: custom_id 'a' is that of an earlier line",
        4: "url: /v1/embeddings is not answered here",
        5: "custom_id: custom_id is missing",
        6: "method: method must be POST, got GET",
        7: "url: url is missing",
        8: "model: the model 'gpt-4o' does not exist: this run has",
        9: "temperature: temperature: must be at most 2, got 3",
        10: "tools: tools: ",
        11: "frequency: frequency is not supported",
        12: "messages: messages is missing",
        13: "messages: message 0 has content; it needs role and content",
        14: "json_schema: json_schema: is not a valid JSON Schema: /type",
        15: "messages: 3011 prompt tokens and max_tokens 1 exceed max_model_len 2048",
        16: "prompt: prompt must be text, a list of token ids, or a list of either",
        17: "None: the line is not a JSON object",
        18: "prompt: ",
    }
    assert told.keys() == expected.keys()
    other = {n: told[n] for n, start in expected.items() if not told[n].startswith(start)}
    assert not other
    assert "2 answers in " in ended.stderr and "17 errors in " in ended.stderr
    assert "1 duplicate_custom_id" in ended.result["message"]
    assert ended.result["output"] == str(tmp_path / "out.jsonl")


def test_a_served_name_is_one_that_lines_may_call_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", chat("a", model="gpt-4o"), chat("b", model="model"))
    assert answer(path, "--served-model-name", "gpt-4o").code == 0
    models = [line["response"]["body"]["model"] for line in read(tmp_path / "out.jsonl")]
    assert models == ["gpt-4o", "model"]


def test_what_the_engine_failed_at_is_asked_again_when_told_to(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", *(chat(f"id {n}", f"{n} words") for n in range(6)))
    ended = answer(path, fake={"reject_every": 3})
    assert ended.code == 0 and list(errors(tmp_path)) == [3, 6]
    assert "2 engine_rejected" in ended.result["message"]
    failing = answer(path, "--set", "limits.max_failed_fraction=0.1")
    assert failing.code == 3 and "2 of 6 rows failed" in failing.result["message"]
    again = answer(path, "--retry-failed")
    assert (again.code, again.result["rows_computed"]) == (0, 2)
    assert len(choices(tmp_path)) == 6 and not (tmp_path / "out.errors.jsonl").exists()


def test_a_line_may_ask_for_an_adapter_by_its_name(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", scale=0.0)
    path = write(tmp_path / "in.jsonl", chat("a", model="french"), chat("b"), chat("c", model="x"))
    ended = answer(path, "--set", f"model.adapters.french={adapter}")
    assert ended.code == 0, ended.stderr
    requests = pl.read_parquet(tmp_path / FOLDER / "requests.parquet")
    assert requests["own_lora"].to_list() == ["french", None, None]
    assert read(tmp_path / "out.jsonl")[0]["response"]["body"]["model"] == "french"
    assert "this run has " in errors(tmp_path)[3][1] and "french" in errors(tmp_path)[3][1]


def test_the_same_from_parquet_whether_bodies_are_text_or_structs(tmp_path: Path) -> None:
    lines = [
        chat("a", seed=1, stop=["x"]),
        chat("b", max_tokens=3),
        request("c", COMPLETIONS, {"prompt": "one"}),
    ]
    path = write(tmp_path / "in.jsonl", *lines)
    assert answer(path).code == 0
    expected = {
        name: [c["text"] if "text" in c else c["message"] for c in found]
        for name, found in choices(tmp_path).items()
    }
    as_text = pl.DataFrame([{**line, "body": json.dumps(line["body"])} for line in lines])
    for name, frame in (("text", as_text), ("struct", pl.DataFrame(lines))):
        folder = tmp_path / name
        folder.mkdir()
        frame.write_parquet(folder / "in.parquet")
        ended = answer(folder / "in.parquet", "--set", "sampling.temperature=0")
        assert ended.code == 0, ended.stderr
        assert choices(folder).keys() == expected.keys()
        assert not (folder / "out.errors.jsonl").exists()
    pl.DataFrame({"custom_id": ["a"]}).write_parquet(tmp_path / "bad.parquet")
    refused = answer(tmp_path / "bad.parquet", "--restart")
    assert refused.code == 2 and "has no column method" in refused.stderr


def test_a_batch_that_is_killed_again_and_again_loses_nothing_that_was_finished(
    tmp_path: Path,
) -> None:
    """And writes each custom_id once, as an undisturbed one does."""
    lines = [chat(f"id {n}", f"{n} words", seed=n, temperature=1) for n in range(120)]
    path = write(tmp_path / "in.jsonl", *lines, "broken", chat("id 5"))
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole / "in.jsonl", *lines, "broken", chat("id 5"))
    assert answer(whole / "in.jsonl").code == 0
    expected = choices(whole)
    slow = {"step_s": 0.05, "max_num_seqs": 8}
    parts = tmp_path / FOLDER / "results/_batchinfer/parts"
    num_durable = 0
    for _ in range(2):
        process = start(
            path, *options(tmp_path, "--set", "checkpoint.every_rows=8"), **COMMAND, fake=slow
        )
        wait_until(lambda before=num_durable: _rows_in(parts) >= before + 16, what="durable rows")
        kill(process)
        process.communicate()
        num_durable = _rows_in(parts)
        assert not (tmp_path / "out.jsonl").exists()
    ended = answer(path)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows_computed"] <= 120 - num_durable
    assert choices(tmp_path) == expected
    counts = Counter(line["custom_id"] for line in read(tmp_path / "out.jsonl"))
    assert counts == dict.fromkeys((line["custom_id"] for line in lines), 1)
    assert list(errors(tmp_path)) == [121, 122]


def _rows_in(parts: Path) -> int:
    return sum(pl.read_parquet(part).height for part in parts.rglob("*.part"))


def test_a_kill_while_lines_are_read_or_answers_written_leaves_nothing_half(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "in.jsonl", *(chat(f"id {n}") for n in range(5)), "broken")
    for key in ("requests.parquet", "answers.jsonl"):
        crash = {"op": "publish", "key": f"^{re.escape(key)}$", "when": "written"}
        assert answer(path, crash=crash).code == -9
        assert not (tmp_path / "out.jsonl").exists()
    ended = answer(path)
    assert (ended.code, ended.result["rows_computed"]) == (0, 0)
    assert len(choices(tmp_path)) == 5 and list(errors(tmp_path)) == [6]
    assert not list((tmp_path / FOLDER).glob(".*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--set", "sampling.max_tokens=3"), "with another sampling.max_tokens"),
        (("--served-model-name", "x"), "with another served model name"),
        (("--set", "prompt.column=x"), "--set: prompt.column: the batch file says that"),
        (("--set", 'sampling={"n": 3}'), "--set: sampling.n: the batch file says that"),
        (("-e", "s3://bucket/e.jsonl"), "-e s3://bucket/e.jsonl: a batch file is a local file"),
    ],
)
def test_what_would_mix_two_batches_is_refused(
    change: tuple[str, str], told: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", chat("a"))
    assert answer(path).code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    refused = answer(path, *change)
    assert refused.code == 2 and told in refused.stderr, refused.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_another_input_under_the_same_output_is_refused_until_a_restart(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", chat("a"), "broken")
    assert answer(path).code == 0
    write(path, chat("b"))
    refused = answer(path)
    assert refused.code == 2 and "with another input" in refused.stderr
    assert answer(path, "--restart").code == 0
    assert list(choices(tmp_path)) == ["b"]
    assert not (tmp_path / "out.errors.jsonl").exists()  # those of the batch before are gone


@pytest.mark.parametrize(
    ("crash", "is_asked_again"),
    [
        ({"op": "publish", "key": r"^requests\.parquet$", "when": "after"}, True),
        ({"op": "put", "key": r"restart\.json$", "when": "after"}, False),
        ({"op": "delete", "key": r"requests\.parquet$", "when": "after"}, False),
        ({"op": "delete", "key": r"restart\.json$", "when": "after"}, False),
    ],
)
def test_a_restart_with_another_input_that_is_killed_mixes_no_two_inputs(
    crash: dict[str, Any], is_asked_again: bool, tmp_path: Path
) -> None:
    """Both have the same ids and as many bytes. The old input is refused from then on, the new one
    goes on or says what to do.
    """
    old = write(tmp_path / "old.jsonl", chat("a", "of the old"), chat("b", "one"))
    new = write(tmp_path / "new.jsonl", chat("a", "of the new"), chat("b", "two"))
    assert answer(old).code == 0
    before = choices(tmp_path)
    assert answer(new, "--restart", crash=crash).code == -9
    refused = answer(old)
    assert refused.code == 2 and "with another input" in refused.stderr, refused.stderr
    ended = answer(new)
    if is_asked_again:
        assert ended.code == 2 and "a --restart was not finished" in ended.stderr, ended.stderr
        assert choices(tmp_path) == before
        ended = answer(new, "--restart")
    assert ended.code == 0 and ended.result["rows_computed"] == 2, ended.stderr
    assert choices(tmp_path)["a"] != before["a"] and choices(tmp_path)["b"] != before["b"]


@pytest.mark.parametrize("option", [(), ("--restart",)])
def test_a_second_start_leaves_the_first_and_its_lines_alone(
    option: tuple[str, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", *(chat(f"id {n}") for n in range(8)))
    requests = tmp_path / FOLDER / "requests.parquet"
    first = start(path, *options(tmp_path), **COMMAND, fake={"step_s": 0.3})
    wait_until(lambda: list((tmp_path / FOLDER).glob("results/*")), what="the output")
    before = requests.stat()
    second = answer(path, *option)
    assert second.code == 75 and "another run is working on" in second.stderr, second.stderr
    assert requests.stat() == before or requests.stat().st_ino == before.st_ino
    assert wait(first).code == 0
    assert len(choices(tmp_path)) == 8


def test_a_batch_without_a_line_that_can_be_asked_loads_no_model(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", "broken")
    ended = answer(path, fake={"fail_build": "no model is to be built"})
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "out.jsonl").read_text() == "" and list(errors(tmp_path)) == [1]


@pytest.mark.parametrize(
    ("sets", "environ", "told"),
    [
        (["sampling.n=3"], {}, "--set: sampling.n: "),
        (["sampling=null"], {}, "--set: sampling: "),
        (['sampling={"per_row": {"max_tokens": "line"}}'], {}, "sampling.per_row.max_tokens: "),
        (["prompt=null"], {}, "--set: prompt: "),
        ([], {"BATCHINFER__INPUT__FILTER": "line = 1"}, "BATCHINFER__INPUT__FILTER: input.filter"),
        ([], {"BATCHINFER__OUTPUT__PATH": "/x"}, "BATCHINFER__OUTPUT__PATH: output.path: "),
        ([], {"BATCHINFER__SAMPLING": '{"n": 2}'}, "BATCHINFER__SAMPLING: sampling.n: "),
    ],
)
def test_what_the_batch_says_itself_is_refused_wherever_else_it_is_said(
    sets: list[str], environ: dict[str, str], told: str, tmp_path: Path
) -> None:
    """Lines would be in neither file, or answered otherwise than they ask."""
    path = write(tmp_path / "in.jsonl", chat("a"), chat("b"))
    refused = answer(path, *(word for one in sets for word in ("--set", one)), environ=environ)
    assert refused.code == 2 and told in refused.stderr, refused.stderr
    assert "the batch file says that, line by line" in refused.stderr
    assert not (tmp_path / FOLDER).exists()


def test_an_endpoint_that_a_variable_says_for_other_jobs_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", chat("a"), chat("b"))
    ended = answer(path, environ={"BATCHINFER__OUTPUT__S3__REGION": "eu-central-1"})
    assert ended.code == 0 and len(choices(tmp_path)) == 2, ended.stderr


def chat_of_depth(custom_id: str, key: str, depth: int) -> str:
    """A line with lists in lists, which `json.dumps` would not write."""
    name = "json" if key == "structured_outputs" else "x"
    deep = "[" * depth + "]" * depth
    return json.dumps(chat(custom_id, **{key: {name: "@"}})).replace('"@"', f'{{"x": {deep}}}')


def test_no_value_of_a_line_ends_the_batch_however_deep_or_large(tmp_path: Path) -> None:
    bad = [
        chat_of_depth("kwargs", "chat_template_kwargs", 500),
        chat_of_depth("schema", "structured_outputs", 600),
        chat("as text", structured_outputs={"json": "[" * 300 + "]" * 300}),
        chat("wide", top_k=10**30),
        chat("wide seed", seed=2**63),
        chat("huge", temperature=10**400),
        chat("ids", stop_token_ids=[10**30]),
        chat("no token", stop_token_ids=[5, 4096]),
        chat("nan", temperature=float("nan")),
    ]
    path = write(tmp_path / "in.jsonl", chat("a"), *bad, chat("b"))
    ended = answer(path)
    assert ended.code == 0, ended.stderr
    assert list(choices(tmp_path)) == ["a", "b"]
    assert f"{len(bad)} invalid_value" in ended.result["message"]


def test_a_text_that_is_cut_within_a_character_is_its_lines_error(tmp_path: Path) -> None:
    """Half a surrogate pair is JSON and no text. Of keys without a bearing it is passed over."""
    half = "\ud83d"
    path = write(
        tmp_path / "in.jsonl",
        chat("a", f"hi {half}"),
        chat(f"b{half}"),
        chat("c", stop=[half]),
        chat("d", metadata={half: half}),
        request("e", f"/v1/{half}", {}),
        chat("f", model=half),
        chat("g", **{half: 1}),
        request("h", COMPLETIONS, {"prompt": ["x", half]}),
        chat("i", chat_template_kwargs={"a": {half: 1}}),
    )
    ended = answer(path)
    assert ended.code == 0, ended.stderr
    assert list(choices(tmp_path)) == ["d"]
    codes = {
        line["error"]["line"]: line["error"]["code"] for line in read(tmp_path / "out.errors.jsonl")
    }
    assert codes == {
        1: "invalid_prompt",
        2: "invalid_custom_id",
        3: "invalid_value",
        5: "invalid_url",
        6: "invalid_value",
        7: "unsupported_parameter",
        8: "invalid_prompt",
        9: "invalid_value",
    }


def test_values_of_parquet_that_json_does_not_have_are_errors_of_their_lines(
    tmp_path: Path,
) -> None:
    """A decimal is a number; others count only where they have a bearing."""
    user = {"role": "user", "content": "hi"}
    when = datetime(2026, 1, 1, tzinfo=UTC)
    bodies = [
        {"messages": [user], "temperature": Decimal("0.5"), "max_tokens": Decimal(4)},
        {"messages": [{**user, "at": when}], "temperature": None, "max_tokens": None},
    ]
    columns = {"custom_id": ["a", "b"], "method": ["POST"] * 2, "url": [CHAT] * 2}
    kind = pa.struct(
        {
            "messages": pa.list_(pa.struct(dict.fromkeys(user, pa.string()) | {"at": pa.date32()})),
            "temperature": pa.decimal128(2, 1),
            "max_tokens": pa.decimal128(9, 0),
        }
    )
    table = pa.table({**columns, "body": pa.array(bodies, kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    ended = answer(tmp_path / "in.parquet")
    assert ended.code == 0, ended.stderr
    assert list(choices(tmp_path)) == ["a"]
    assert errors(tmp_path) == {2: ("messages", "messages holds a date, which JSON does not have")}


def test_whole_numbers_of_parquet_are_whole_beside_a_null_too(tmp_path: Path) -> None:
    """Which makes a column of floats of them, also in a field of a struct."""
    lines = [chat("a", max_tokens=8.0, seed=3.0), chat("b", max_tokens=2.5), chat("c")]
    del lines[2]["body"]["max_tokens"]
    pl.DataFrame(lines).write_parquet(tmp_path / "in.parquet")
    assert pl.read_parquet_schema(tmp_path / "in.parquet")["body"].to_schema()["seed"].is_float()
    ended = answer(tmp_path / "in.parquet")
    assert ended.code == 0, ended.stderr
    assert list(choices(tmp_path)) == ["a", "c"]
    assert errors(tmp_path) == {2: ("max_tokens", "max_tokens: must be a whole number, got 2.5")}
    requests = pl.read_parquet(tmp_path / FOLDER / "requests.parquet")
    assert requests["own_max_tokens"][0] == 8 and requests["own_seed"][0] == 3


def test_keys_that_a_chat_template_reads_reach_it_and_others_refuse_their_line(
    tmp_path: Path,
) -> None:
    """A template that does not read them would pass them over."""
    texts = [{"title": "t", "text": "one two three"}]
    path = write(
        tmp_path / "in.jsonl",
        chat("plain"),
        chat("effort", reasoning_effort="low"),
        chat("none", reasoning_effort="none"),
        chat("documents", documents=texts),
        chat("odd", reasoning_effort="lots"),
        chat("bad", documents=["a"]),
    )
    assert answer(path).code == 0
    assert list(choices(tmp_path)) == ["plain", "none"]
    unread = "has no effect: the chat template does not read it"
    found = errors(tmp_path)
    assert found[2] == ("reasoning_effort", f"reasoning_effort {unread}")
    assert found[4] == ("documents", f"documents {unread}")
    assert found[5][1].startswith("reasoning_effort must be one of none, minimal, ")
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %} think hard"
        "{% endif %}{% for d in documents or [] %} {{ d.text }}{% endfor %}"
    )
    assert answer(path, "--chat-template", template, "--restart").code == 0
    assert list(choices(tmp_path)) == ["plain", "effort", "none", "documents"]
    requests = pl.read_parquet(tmp_path / FOLDER / "requests.parquet")
    lengths = dict(zip(requests["custom_id"], requests["token_ids"].list.len(), strict=True))
    assert lengths["plain"] == lengths["none"] < min(lengths["effort"], lengths["documents"])
    assert list(errors(tmp_path)) == [5, 6]


def test_one_value_that_cannot_be_read_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    """Bytes that are no UTF-8; a date that Python does not have."""
    good, bad = json.dumps(chat("a")["body"]).encode(), b'{"messages": "\xff"}'
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([bad, good], pa.binary()).buffers())
    late = pa.array([2**61, 0], pa.timestamp("us"))
    for name, body in (("text", texts), ("struct", pa.StructArray.from_arrays([late], ["at"]))):
        columns = {"custom_id": ["a", "b"], "method": ["POST"] * 2, "url": [CHAT] * 2}
        pq.write_table(pa.table({**columns, "body": body}), tmp_path / f"{name}.parquet")
    with opened(tmp_path / "text.parquet") as file:
        (first, second) = read_lines(file)
    assert first.custom_id == "a" and first.refusal is not None
    assert (first.refusal.code, first.refusal.param) == ("invalid_json", "body")
    assert second.refusal is None and "messages" in second.body
    with opened(tmp_path / "struct.parquet") as file:
        (first, second) = read_lines(file)
    assert first.refusal is not None and first.refusal.code == "invalid_line"
    assert second.refusal is None and "at" in second.body


def test_logprobs_that_no_line_asks_for_may_be_a_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", chat("a"))
    ended = answer(path, "--set", "sampling.logprobs=1")
    assert ended.code == 0, ended.stderr
    assert choices(tmp_path)["a"][0]["logprobs"]["content"]
    results = tmp_path / FOLDER / "results" / "requests.parquet"
    results.write_bytes(results.read_bytes()[:50])
    refused = answer(path, "--set", "sampling.logprobs=1")
    assert refused.code == 2 and f"{results} is damaged: " in refused.stderr, refused.stderr
    assert "Move it away and start again" in refused.stderr
    results.unlink()
    again = answer(path, "--set", "sampling.logprobs=1")
    assert (again.code, again.result["rows_computed"]) == (0, 1), again.stderr


def test_a_pipe_is_answered_as_the_file_would_be(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    os.mkfifo(path)
    for _ in range(2):
        process = start(path, *options(tmp_path), **COMMAND)
        path.write_text(json.dumps(chat("a")) + "\n")
        assert wait(process).code == 0
        assert list(choices(tmp_path)) == ["a"]
    with pytest.raises(ConfigError, match="jsonl is no regular file: -o and -e name files"):
        BatchFiles.of("x.jsonl", str(path), None)


def test_a_file_that_changes_while_it_is_read_is_not_answered(tmp_path: Path) -> None:
    """What its digest is of would not be what is answered."""
    path = write(tmp_path / "in.jsonl", *(chat(f"id {n}") for n in range(9)))
    with opened(path) as file:
        lines = read_lines(file)
        next(lines)
        with path.open("a") as more:
            more.write("{}\n")
        with pytest.raises(InputError, match="changed while it was read"):
            list(lines)


def test_a_batch_leaves_the_errors_of_another(tmp_path: Path) -> None:
    """Their files have names of their own, and what another wrote is not deleted."""
    names = ["day", "day.29", "day.30", "day.jsonl", "day.parquet", "day.json"]
    assert len({BatchFiles.of("in", name, None).errors.name for name in names}) == len(names)
    path = write(tmp_path / "in.jsonl", chat("c"))
    mine = tmp_path / "mine.txt"
    mine.write_text("of another")
    ended = answer(path, "-e", str(mine))
    assert ended.code == 0 and "it is left as it is" in ended.stderr
    assert mine.read_text() == "of another"


@pytest.mark.parametrize("template", ["/nope.jinja", "hello", "{{ x"])
def test_a_chat_template_that_cannot_be_is_refused_before_anything(
    template: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", chat("a", chat_template_kwargs={"x": 1}))
    ended = answer(path, "--chat-template", template)
    assert ended.code == 2 and "chat" in ended.result["message"], ended.stderr
    assert "pydantic" not in ended.stderr
    assert not (tmp_path / FOLDER).exists()


def test_a_batch_is_known_by_the_text_of_its_chat_template(tmp_path: Path) -> None:
    """Wherever the file is, and not once it says something else."""
    path = write(tmp_path / "in.jsonl", chat("a"))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert answer(path, "--chat-template", str(template)).code == 0
    moved = template.rename(tmp_path / "moved.jinja")
    assert answer(path, "--chat-template", str(moved)).code == 0
    moved.write_text("{% for m in messages %}say {{ m.content }}{% endfor %}")
    refused = answer(path, "--chat-template", str(moved))
    assert refused.code == 2 and "with another chat template" in refused.stderr


def test_a_file_is_moved_whole_to_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = tmp_path / "made", tmp_path / "new" / "out.errors.jsonl"
    made.write_text("x")
    replace = os.replace

    def of_one_folder(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", of_one_folder)
    batch._move(made, path)
    assert path.read_text() == "x" and not made.exists()
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_completion_that_was_all_thought_is_text_all_the_same() -> None:
    row = {
        **{"url": COMPLETIONS, "choice": 0, "prompt": 0, "num_prompt_tokens": 1, "model": None},
        **{"num_completion_tokens": 1, "finished_at": datetime(2026, 1, 1, tzinfo=UTC)},
        **{"custom_id": "a", "completion": None, "reasoning": "hm", "token_logprobs": None},
        **{"stop_reason": None, "finish_reason": "length", "returns_token_ids": False},
    }
    line = Answers("batch", "model", None).answered(1, [row])
    (choice,) = line["response"]["body"]["choices"]
    assert (choice["text"], choice["reasoning"]) == ("", "hm")


def test_an_input_that_is_not_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    ended = answer(tmp_path / "in.jsonl")
    assert ended.code == 2 and "there is no input file" in ended.stderr
    assert not (tmp_path / FOLDER).exists()


def test_a_signal_while_lines_are_read_ends_it_with_its_code(tmp_path: Path) -> None:
    lines = [chat(f"id {n}", "word " * 200) for n in range(20_000)]
    path = write(tmp_path / "in.jsonl", *lines)
    process = start(path, *options(tmp_path), **COMMAND)
    wait_until(lambda: (tmp_path / FOLDER).exists(), what="the folder")
    time.sleep(0.2)
    kill(process, signal.SIGTERM)
    ended = wait(process)
    assert ended.code == 143, ended.stderr
    assert "received SIGTERM" in ended.stderr
