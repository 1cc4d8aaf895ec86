"""Jobs on llama.cpp through the command line: beside vLLM, killed, and with nothing else there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.support.gguf import make_gguf
from tests.support.jobs import (
    MODEL,
    ROOT,
    Place,
    job,
    kill,
    results,
    run,
    stable,
    start,
    wait,
    wait_until,
    write_job,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MESSAGES = [
    {"role": "user", "content": "Summarize this software package in one line.\n\n{{ description }}"}
]
#: What the light installation does not have.
ABSENT = ("vllm", "torch", "transformers", "tokenizers", "huggingface_hub", "safetensors")


def write_input(place: Place, num_rows: int) -> None:
    frame = pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet").head(num_rows)
    place.write_parquet("in/a.parquet", frame)


def llama_job(place: Place, model: Path, **sections: Any) -> dict[str, Any]:
    return job(
        place,
        **{
            "prompt": {"messages": MESSAGES},
            "model": {"path": str(model)},
            "engine": {"name": "llama_cpp"},
            "sampling": {"max_tokens": 48, "logprobs": 1},
            **sections,
        },
    )


@pytest.mark.real_engine
def test_the_same_rows_get_the_same_tokens_as_from_vllm(folder: Place, tmp_path: Path) -> None:
    """In float32, of a file made by the command, with one job file but for engine and model."""
    write_input(folder, 64)
    file = tmp_path / "demo.gguf"
    made = run(
        str(MODEL), str(file), "--method", "gguf", "--type", "f32", command=("quantize",),
        engine="real",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    settings = llama_job(folder, file)
    ended = run(write_job(tmp_path, settings), engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    ours = results(folder)
    facts = json.loads(pq.read_metadata(folder.url("out/a.parquet")).metadata[b"batchinfer"])
    assert facts["engine"]["name"] == "llama_cpp"
    settings |= {"engine": {"name": "vllm"}, "output": {"path": folder.url("other")}}
    settings["model"] = {"path": str(MODEL), "dtype": "float32"}
    ended = run(write_job(tmp_path, settings), engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    theirs = results(folder, "other")
    columns = ["id", "completion", "token_ids", "finish_reason", "stop_reason", "num_prompt_tokens"]
    assert ours.height == 64
    assert ours.select(columns).equals(theirs.select(columns))
    assert (ours["cumulative_logprob"] - theirs["cumulative_logprob"]).abs().max() < 1e-3


def test_a_killed_run_is_continued_and_each_row_has_one_result(
    folder: Place, demo_gguf: Path, tmp_path: Path
) -> None:
    write_input(folder, 80)
    path = write_job(
        tmp_path, llama_job(folder, demo_gguf, sampling={"max_tokens": 20, "logprobs": 1})
    )
    whole = run(path, "--set", f"output.path={folder.url('whole')}", engine="real", timeout_s=280)
    assert whole.code == 0, whole.stderr
    process = start(path, engine="real")
    wait_until(lambda: folder.parts(), timeout_s=200, what="a part")
    kill(process)
    wait(process)
    assert not [name for name in folder.names("out") if name.endswith(".parquet")]
    ended = run(path, engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    assert 0 < ended.result["rows_computed"] < 80
    ours, theirs = (
        stable(results(folder, name)).drop(["token_logprobs", "cumulative_logprob", "top_logprobs"])
        for name in ("out", "whole")
    )
    assert ours.equals(theirs)


def test_a_file_that_was_replaced_is_refused(
    folder: Place, demo_gguf: Path, tmp_path: Path
) -> None:
    write_input(folder, 4)
    file = Path(shutil.copy(demo_gguf, tmp_path / "model.gguf"))
    path = write_job(tmp_path, llama_job(folder, file))
    assert run(path, engine="real").code == 0
    make_gguf(MODEL, tmp_path / "other.gguf", "q8_0")
    (tmp_path / "other.gguf").rename(file)
    ended = run(path, engine="real")
    assert ended.code == 2
    assert "model.content.weights" in ended.stderr


def test_a_job_runs_where_nothing_but_llama_cpp_is_installed(
    folder: Place, demo_gguf: Path, tmp_path: Path
) -> None:
    """Neither vLLM nor torch nor transformers nor tokenizers: their import fails."""
    write_input(folder, 6)
    path = write_job(tmp_path, llama_job(folder, demo_gguf, sampling={"max_tokens": 8}))
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "from batchinfer.cli import main\nmain()"
    )
    for command in ("validate", "plan", "run"):
        ran = subprocess.run(
            [sys.executable, "-c", code, command, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    assert results(folder)["completion"].str.len_chars().min() > 0


def test_texts_are_scored_as_vllm_scores_them(
    folder: Place, demo_gguf: Path, tmp_path: Path
) -> None:
    """In windows, with top lists; the reference is a plain forward pass in the tests of vLLM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.end_to_end.test_score import CONTEXT, STRIDE, in_windows

    texts = pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")["description"][:6].to_list()
    folder.write_parquet("in/a.parquet", pl.DataFrame({"id": texts, "text": texts}))
    settings = llama_job(
        folder, demo_gguf, task="score", prompt={"column": "text"},
        score={"context": CONTEXT, "stride": STRIDE, "top_logprobs": 4},
    )  # fmt: skip
    settings.pop("sampling")
    ended = run(write_job(tmp_path, settings), engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    for row in results(folder).iter_rows(named=True):
        expected = in_windows(model, tokenizer(row["id"])["input_ids"])
        found = row["token_logprobs"][1:]
        assert len(found) == len(expected)
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-3
