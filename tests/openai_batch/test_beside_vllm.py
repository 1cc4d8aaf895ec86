"""The same lines through vLLM's own run-batch and ours: the same answers, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.openai_batch.test_run_batch import chat, read, write
from tests.support.jobs import MODEL, ROOT, run, run_python

pytestmark = [pytest.mark.real_engine, pytest.mark.slow]

RUN_BATCH = """
import asyncio, os
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}  # not ours
from vllm.entrypoints.launchers.run_batch import main, parse_args

if __name__ == "__main__":
    asyncio.run(main(parse_args()))
"""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
#: Ways to ask; all greedy.
WAYS: list[dict[str, Any]] = [
    {"max_tokens": 24},
    {"max_completion_tokens": 5, "max_tokens": None, "logprobs": True, "top_logprobs": 2},
    {"stop": ["a"], "max_tokens": 40},
    {"stop_token_ids": [68, 75], "repetition_penalty": 1.2, "max_tokens": 40},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    {"max_tokens": None},
]


def told(path: Path) -> dict[str, list[Any]]:
    """By custom_id: text, token ids, reasons, usage, tokens with logprobs rounded."""
    found = {}
    for line in read(path):
        body = line["response"]["body"]
        (choice,) = body["choices"]
        logprobs = choice["logprobs"] and [
            [(one["token"], round(one["logprob"], 3)) for one in (token, *token["top_logprobs"])]
            for token in choice["logprobs"]["content"]
        ]
        usage = {k: body["usage"][k] for k in ("prompt_tokens", "completion_tokens")}
        found[line["custom_id"]] = [
            choice["message"]["content"],
            choice["token_ids"],
            choice["finish_reason"],
            choice["stop_reason"],
            usage,
            logprobs,
        ]
    return found


def test_answers_are_those_of_vllms_own_run_batch(tmp_path: Path) -> None:
    texts = pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")["description"][:18].to_list()
    lines = []
    for number, text in enumerate(texts):
        way = {"temperature": 0, "return_token_ids": True, "max_tokens": 64, "model": str(MODEL)}
        prompt = f"Summarize this software package in one line.\n\n{text}"
        lines.append(chat(f"id {number}", prompt, **way | WAYS[number % len(WAYS)]))
    path = write(tmp_path / "in.jsonl", *lines)
    theirs = tmp_path / "theirs.jsonl"
    ended = run_python(
        *("-c", RUN_BATCH, "-i", str(path), "-o", str(theirs)),
        *("--model", str(MODEL), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 28)),
        spares=(1,),  # its core
        timeout_s=400,
    )
    assert ended.code == 0, ended.stderr[-3000:]
    ours = run(
        path,
        *("-o", str(tmp_path / "out.jsonl"), "--model", str(MODEL)),
        *("--set", "model.dtype=float32", "--set", "model.max_model_len=1024"),
        command=("run-batch", "-i"),
        engine="real",
        timeout_s=400,
    )
    assert ours.code == 0, ours.stderr
    expected, found = told(theirs), told(tmp_path / "out.jsonl")
    assert list(found) == list(expected) == [line["custom_id"] for line in lines]
    for custom_id, answer in expected.items():
        assert found[custom_id] == answer, custom_id
    assert {answer[2] for answer in found.values()} == {"stop", "length"}
    assert json.loads(found["id 4"][0]).keys() == {"name", "size"}
