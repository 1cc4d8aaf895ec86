"""Scores of the real engine beside a plain forward pass of transformers in float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from tests.support.jobs import MODEL, ROOT, Place, results, run, write_job
from tests.support.scoring import score_job

pytestmark = pytest.mark.real_engine

CONTEXT, STRIDE = 96, 32


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Of one token, shorter than a window, as long as one, one token longer, and far longer."""
    rows = pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")["description"].to_list()
    return ["a", rows[0][:80], rows[1], "\n".join(rows[:30])]


def forward(model: Any, token_ids: list[int]) -> npt.NDArray[np.float64]:
    """The logprob of each token but the first, given all before it. [n - 1]"""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return chosen.double().numpy()


def in_windows(model: Any, token_ids: list[int]) -> list[float]:
    """Written apart from the program: token by token, in the first window that has it."""
    scores: list[float] = []
    by_window: dict[int, npt.NDArray[np.float64]] = {}
    for position in range(1, len(token_ids)):
        window = max(0, -(-(position + 1 - CONTEXT) // STRIDE))
        start = window * STRIDE
        if window not in by_window:
            by_window[window] = forward(model, token_ids[start : start + CONTEXT])
        scores.append(float(by_window[window][position - start - 1]))
    return scores


@pytest.mark.parametrize("max_model_len", [2048, CONTEXT])
def test_scores_are_those_of_a_plain_forward_pass(
    max_model_len: int, texts: list[str], tmp_path: Path
) -> None:
    """Also where a window fills the model, and its last token is the one that is generated."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    place = Place(str(tmp_path))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    ids += [ids[-1][:length] for length in (CONTEXT - 1, CONTEXT, CONTEXT + 1, CONTEXT + STRIDE)]
    place.write_parquet("in/a.parquet", pl.DataFrame({"id": range(len(ids)), "ids": ids}))
    settings = score_job(
        place,
        prompt={"token_ids_column": "ids"},
        score={"context": CONTEXT, "stride": STRIDE},
        model={"path": str(MODEL), "dtype": "float32", "max_model_len": max_model_len},
    )
    ended = run(write_job(tmp_path, settings), engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    have = results(place)
    for row, token_ids in zip(have.iter_rows(named=True), ids, strict=True):
        assert row["token_ids"] == token_ids
        wanted = in_windows(model, token_ids)
        assert row["token_logprobs"][:1] == [None]
        np.testing.assert_allclose(row["token_logprobs"][1:], wanted, rtol=1e-4, atol=1e-6)
        assert math.isclose(row["cumulative_logprob"], sum(wanted), rel_tol=1e-4, abs_tol=0)
    longest = max(map(len, ids))
    assert longest > 10 * CONTEXT


def test_the_demo_job_scores_the_completions_of_its_prompts(tmp_path: Path) -> None:
    """Of the whole context, in the dtype of the machine; the reference is rendered here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    place = Place(str(tmp_path))
    shard = ROOT / "jobs/demo/prompts/prompts-00000-of-00004.parquet"
    sets = [f"output.path={place.url('out')}", f"input.path={shard}", "model.dtype=fp32"]
    arguments = [a for s in sets for a in ("--set", s)]
    ended = run(ROOT / "jobs/score.yaml", "--limit", "40", *arguments, engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    parts = [name for name in place.names("out") if name.endswith(".part")]
    have = pl.concat([place.read_parquet(f"out/{name}") for name in parts]).sort("row")
    assert have.height == 40
    given = pl.read_parquet(shard)
    for row in have.head(5).iter_rows(named=True):
        source = given.row(row["row"], named=True)
        content = "Summarize this software package in one line.\n\n" + source["description"]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
        )
        completion = tokenizer(source["reference_summary"], add_special_tokens=False)["input_ids"]
        assert row["token_ids"] == completion
        assert row["num_prompt_tokens"] == len(prompt)
        assert row["num_text_bytes"] == len(source["reference_summary"].encode())
        wanted = forward(model, [*prompt, *completion])[-len(completion) :]
        np.testing.assert_allclose(row["token_logprobs"], wanted, rtol=1e-4, atol=1e-6)
